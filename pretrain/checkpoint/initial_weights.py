"""Weights to start a run from (``MODEL.WEIGHTS``): the ResNet of any project's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco_common import comm
from moco_common.backbone.accounting import odd_values, summary
from moco_common.backbone.architecture import Architecture, detect
from moco_common.backbone.read_encoder import Encoder, fingerprint, read_encoder
from moco_common.errors import UserError
from moco_common.reader.errors import CheckpointError
from pretrain import distributed
from pretrain.modeling.resnet import PIXEL_MEAN, PIXEL_STD, ResNet

_CLOSE = 1.0  # levels of 255 by which pixel means may differ, far below the noise of a camera
_COUNTER = "num_batches_tracked"
# Refusals of a file that the converter's options may resolve.
_OPTIONAL = ("unknown_tensor", "unrecognised", "option", "missing_tensor")


@dataclass(frozen=True)
class InitialWeights:
    """A ResNet to start from.

    Attributes:
        path: the file.
        sha256: its SHA-256.
        encoder: its content, each tensor accounted for.
        tensors: float32 backbone tensors by torchvision name, for RGB pixels normalised with
            `PIXEL_MEAN` and `PIXEL_STD`.
        notes: remarks for the log, one sentence each.
    """

    path: Path
    sha256: str
    encoder: Encoder
    tensors: dict[str, Tensor]
    notes: list[str]

    def record(self) -> dict[str, str]:
        """The entry of a run's checkpoints that says what the run started from."""
        found = self.encoder.found
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "source": found.source.name,
            "encoder": found.encoder,
        }

    def describe(self) -> str:
        """Name the file, its fingerprint, and the encoder that is taken from it."""
        found = self.encoder.found
        where = f" under {found.prefix!r}" if found.prefix else ""
        return (
            f"{self.path} (SHA-256 {self.sha256[:12]}...): {self.encoder.architecture}, the "
            f"{found.encoder} encoder of {found.source.name}{where}"
        )


def read_initial_weights(path: str | Path) -> InitialWeights:
    """Read the ResNet of any checkpoint that the converter reads, executing nothing.

    A network for BGR images, or one whose pixels are divided by other standard deviations, is
    turned into the equal one for this project's normalisation: its first convolution takes the
    channels in reverse, each multiplied by the ratio of the deviations.

    Raises:
        UserError: the file cannot be read, holds no plain ResNet, has tensors that cannot be
            accounted for, values that are not finite, strides in the 1x1 convolutions, or other
            pixel means.
    """
    path = Path(path)
    try:
        encoder = read_encoder(path)
    except CheckpointError as error:
        advice = (
            f" Or convert the file first with `tools/convert.py {path} --to torchvision`, whose "
            f"options choose the encoder and drop tensors, and start from the result."
        )
        text = f"MODEL.WEIGHTS: {error.at(path)}"
        raise UserError(text + advice if error.kind in _OPTIONAL else text) from None
    _check_strides(path, encoder)
    tensors = {
        name: tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64, copy=True)
        for name, tensor in encoder.tensors.items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"MODEL.WEIGHTS {path} has values in {name} that are not finite: choose an earlier "
                f"checkpoint of that run."
            )
    notes = [*encoder.notes, *odd_values(tensors)]
    if said := _adapt_pixels(path, tensors, encoder.settings):
        notes.append(said)
    return InitialWeights(path, fingerprint(path), encoder, tensors, notes)


def _check_strides(path: Path, encoder: Encoder) -> None:
    if encoder.settings["stride_in_1x1"] and encoder.architecture.block == "bottleneck":
        raise UserError(
            f"MODEL.WEIGHTS {path} is a ResNet with the strides in its first 1x1 convolutions "
            f"(MSRA's layout, STRIDE_IN_1X1), but the ResNet of pre-training has them in the 3x3 "
            f"convolutions and would compute something else: choose weights in torchvision's "
            f"layout."
        )


def _adapt_pixels(
    path: Path, tensors: dict[str, Tensor], settings: Mapping[str, Any]
) -> str | None:
    """Adapt the first convolution to RGB and `PIXEL_STD`; return a note if that changes it."""
    mean, std = list(settings["pixel_mean"]), list(settings["pixel_std"])
    reversed_channels = settings["format"] == "BGR"
    if reversed_channels:
        mean, std = mean[::-1], std[::-1]
    if any(abs(a - b) > _CLOSE for a, b in zip(mean, PIXEL_MEAN, strict=True)):
        raise UserError(
            f"MODEL.WEIGHTS {path} was trained on pixels with the RGB mean {mean}, but "
            f"pre-training subtracts {list(PIXEL_MEAN)}: choose weights with ImageNet's pixel "
            f"statistics, or convert the file with --pixel-mean if it states wrong ones."
        )
    ratios = torch.tensor(PIXEL_STD) / torch.tensor(std)  # 3
    weight = tensors["conv1.weight"]
    tensors["conv1.weight"] = weight.flip(1) if reversed_channels else weight
    rescaled = bool((ratios - 1).abs().max() > 1e-3)
    if rescaled:
        tensors["conv1.weight"] = tensors["conv1.weight"] * ratios.view(1, 3, 1, 1)
    changes = ["BGR images"] * reversed_channels + [f"the pixel deviation {std}"] * rescaled
    if not changes:
        return None
    return (
        f"the weights are for {' and '.join(changes)}: the first convolution was adapted, so that "
        f"the network computes the same on pixels as pre-training normalises them"
    )


def check_architecture(weights: InitialWeights, network: ResNet) -> None:
    """Check that the weights are those of this ResNet.

    Raises:
        UserError: they are of another; the message names the difference and the keys to set.
    """
    backbone = {n: t for n, t in network.state_dict().items() if not n.startswith("fc.")}
    own, theirs = detect(backbone, names={n: n for n in backbone}), weights.encoder.architecture
    theirs = replace(theirs, stride_in_1x1=own.stride_in_1x1)
    if own == theirs:
        return
    values = _model_keys(theirs).items() - _model_keys(own).items()
    keys = [f"{key} {value:g}" for key, value in sorted(values)]
    raise UserError(
        f"MODEL.WEIGHTS {weights.path} is a {theirs}, but this run trains a {own}: set "
        f"{' '.join(keys)}, or choose other weights."
    )


def _model_keys(architecture: Architecture) -> dict[str, float]:
    """The keys of ``MODEL`` that build this network."""
    width = architecture.stem_out_channels / 64
    per_group = architecture.width_per_group
    return {
        "MODEL.DEPTH": architecture.depth,
        "MODEL.WIDTH": width,
        "MODEL.GROUPS": architecture.num_groups,
        "MODEL.WIDTH_PER_GROUP": round(per_group / width) if architecture.block != "basic" else 64,
    }


def start_from(weights: InitialWeights, method: nn.Module, *, take_head: bool) -> list[str]:
    """Load the weights into every encoder of a method. All ranks must call this.

    Args:
        take_head: take the projection head of the file as well and, from a checkpoint of this
            project, the other trained parts of the method, such as BYOL's predictor. A queue or
            memory bank always starts anew.

    Returns:
        What was taken from where, for the log.

    Raises:
        UserError: the architecture differs; a head was asked for and is missing or does not fit;
            the ranks have read different files.
    """
    digests = distributed.all_gather_text(weights.sha256)
    if len(set(digests)) > 1:
        raise UserError(
            f"MODEL.WEIGHTS {weights.path} is not the same file on rank {comm.rank()} as on the "
            f"other ranks: choose a file on a file system that all hosts share."
        )
    encoders = {name: m for name, m in method.named_modules() if isinstance(m, ResNet)}
    check_architecture(weights, next(iter(encoders.values())))
    taken: dict[str, str] = {}  # flattened name in the file -> name in the method
    heads: list[str] = []
    for name, encoder in encoders.items():
        missing, _ = encoder.load_state_dict(weights.tensors, strict=False)
        assert all(key.startswith("fc.") or key.endswith(_COUNTER) for key in missing), missing
        if take_head:
            prefix = weights.encoder.found.prefix
            taken |= _take(weights, encoder.fc, f"{prefix}fc.", f"{name}.fc")
            heads.append(f"{name}.fc")
    if take_head:
        for name, part in method.named_children():
            trained = any(True for _ in part.parameters())
            if trained and not any(isinstance(m, ResNet) for m in part.modules()):
                taken |= _take(weights, part, f"state_dict.{name}.", name)
                heads.append(name)
    entries = [
        replace(entry, target=taken[flat], reason=None) if flat in taken else entry
        for flat, entry in zip(weights.encoder.originals, weights.encoder.entries, strict=True)
    ]
    return [
        f"weights: {weights.describe()}",
        f"weights: {summary(entries, 'taken')}",
        f"weights: {' and '.join(encoders)} start from them, "
        + (f"{' and '.join(heads)} included" if heads else "with new heads")
        + "; the learning rate's schedule, the optimiser and any dictionary start anew",
    ]


def _take(weights: InitialWeights, part: nn.Module, prefix: str, name: str) -> dict[str, str]:
    """Load a part of the method from the file; return the names of its tensors there and here."""
    own = {key: x for key, x in part.state_dict().items() if isinstance(x, Tensor)}
    rest = weights.encoder.rest
    there = {n.removeprefix(prefix): x for n, x in rest.items() if n.startswith(prefix)}
    wanted = {key: tuple(x.shape) for key, x in own.items() if not key.endswith(_COUNTER)}
    found = {key: tuple(x.shape) for key, x in there.items() if not key.endswith(_COUNTER)}
    if wanted != found:
        key = next(k for k in [*wanted, *found] if wanted.get(k) != found.get(k))
        raise UserError(
            f"MODEL.TAKE_HEAD is True, but the head of MODEL.WEIGHTS {weights.path} is not that of "
            f"{name}: {key} is {found.get(key, 'missing')} in the file and "
            f"{wanted.get(key, 'missing')} in this run; set MODEL.TAKE_HEAD False to start with a "
            f"new head."
        )
    part.load_state_dict({key: there.get(key, own[key]) for key in own})
    return {prefix + key: f"{name}.{key}" for key in own if key in there}

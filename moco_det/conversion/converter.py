"""Conversion of a checkpoint to a backbone, accounting for every tensor of the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_common.backbone.accounting import odd_values
from moco_common.backbone.architecture import Architecture, to_detectron2
from moco_common.backbone.pixel_settings import own_metadata
from moco_common.backbone.read_encoder import Encoder, fingerprint, read_encoder
from moco_common.reader.errors import CheckpointError, naming
from moco_common.reader.formats import read_checkpoint
from moco_det.conversion.account import Report
from moco_det.conversion.proof import Proof, prove
from moco_det.conversion.rescale import divide, factors, growth_note
from moco_det.conversion.weight_files import load_detectron2_weights, version, write, writer_for

TARGETS = ("detectron2", "torchvision")


@dataclass(frozen=True)
class Converted:
    """A converted backbone.

    Attributes:
        tensors: float32 tensors (int64 counters) by name in the target, in the network's order.
        metadata: pixel_mean and pixel_std (on the scale 0 to 255, in the channel order of
            "format"), format, stride_in_1x1, depth, num_groups, width_per_group,
            stem_out_channels, res2_out_channels, source, encoder, source_sha256, version; with
            ``rescale`` also rescaled, the largest factor by which a convolution was divided.
        report: what happened to each tensor of the file, warnings, and the proof.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    report: Report


def convert(
    path: str | os.PathLike[str],
    to: str = "detectron2",
    *,
    output: str | os.PathLike[str] | None = None,
    source: str | None = None,
    prefix: str | None = None,
    encoder: str | None = None,
    drop: Sequence[str] = (),
    stride_in_1x1: bool | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    pixel_format: str | None = None,
    rescale: bool = False,
    proof: bool = True,
) -> Converted:
    """Convert the ResNet of any checkpoint.

    Args:
        path: checkpoint of any project, saved by PyTorch, pickle or safetensors.
        to: naming scheme of the result, "detectron2" or "torchvision".
        output: file to write: .pkl (detectron2 only), .pth or .safetensors. It is created only
            after the proof has succeeded on the written content.
        source: name of the project, if it cannot be recognised (see docs/convert.md).
        prefix: prefix of the encoder's tensors in the file, if it cannot be found.
        encoder: which encoder to take from a file with several, such as "key" or "student".
        drop: regular expressions of tensors to drop in addition to the known ones.
        stride_in_1x1: True if a bottleneck's stride is in its first convolution, as in
            Detectron2's MSRA weights. By default as stated in the file, else False.
        pixel_mean, pixel_std: statistics used in training, on the scale 0 to 255. By default as
            stated in the file, else ImageNet's.
        pixel_format: "RGB" or "BGR". By default as stated in the file, else "RGB".
        rescale: whether to give each convolution the norm of a freshly initialised one, adjusting
            the norm after it: the function is unchanged, but fine-tuning moves the weights more
            easily (see `moco_det.conversion.rescale`).
        proof: whether to run the network in both libraries and compare the outputs.

    Returns:
        The tensors, the metadata and the report.

    Raises:
        CheckpointError: the file cannot be read, holds no ResNet that the target can represent,
            lacks tensors or has unknown ones, or the two networks differ by more than 1e-4.
    """
    path = Path(path)
    with naming(path):
        if to not in TARGETS:
            raise CheckpointError(
                f"the target {to} is unknown: choose one of {', '.join(TARGETS)}.", kind="option"
            )
        if output is not None:
            writer_for(Path(output), to)
        stated = {"pixel_mean": pixel_mean, "pixel_std": pixel_std, "format": pixel_format}
        encoder_of_file = read_encoder(
            path, source=source, prefix=prefix, encoder=encoder, drop=drop,
            stated=stated | {"stride_in_1x1": stride_in_1x1},
        )  # fmt: skip
        converted, check = _convert(encoder_of_file, to, fingerprint(path), rescale)
        del encoder_of_file  # never hold the file, the result and what is read back at once
        if output is not None:
            write(
                Path(output),
                converted.tensors,
                converted.metadata,
                to=to,
                check=lambda written: proof and check(*_read_back(written, to)),
            )
        elif proof:
            check(converted.tensors, converted.metadata)
    return converted


def _convert(
    read: Encoder, to: str, sha256: str, rescale: bool
) -> tuple[Converted, Callable[[Mapping[str, Tensor], Mapping[str, Any]], None]]:
    """Return the converted backbone, and a function that proves tensors and metadata right."""
    backbone, architecture, found = read.tensors, read.architecture, read.found
    settings, notes = read.settings, read.notes
    if to == "torchvision" and architecture.stride_in_1x1 and architecture.block != "basic":
        raise CheckpointError(
            "the network has its stride in the first 1x1 convolution of a block (STRIDE_IN_1X1), "
            "torchvision's in the 3x3 convolution: the tensors would load but compute something "
            "else; pass --to detectron2.",
            kind="unsupported",
        )
    rename: Callable[[str], str] = (lambda n: str(to_detectron2(n))) if to == TARGETS[0] else str
    entries = [replace(e, target=e.target and rename(e.target)) for e in read.entries]
    if architecture.block == "basic" and architecture.res2_out_channels != 64:
        notes.append(
            "Detectron2's config cannot build a ResNet-18 or -34 of this width (it requires 64 "
            "channels in res2); its ResNet.make_stage can"
        )
    kept = {torch.float32, torch.int64}
    if others := sorted({str(t.dtype) for t in backbone.values()} - {str(d) for d in kept}):
        notes.append(f"{', '.join(others)} was converted to float32")
    backbone = {name: _owned(tensor) for name, tensor in backbone.items()}
    grown = factors(backbone, architecture)
    if note := growth_note(grown, divided=rescale):
        notes.append(note)
    final = divide(backbone, architecture, grown) if rescale else backbone
    result = {rename(name): tensor for name, tensor in final.items()}
    metadata = {
        "pixel_mean": [float(v) for v in settings["pixel_mean"]],
        "pixel_std": [float(v) for v in settings["pixel_std"]],
        "format": str(settings["format"]),
        **architecture.metadata(),
        "source": str(settings.get("source") or found.source.name),
        "encoder": str(settings.get("encoder") or found.encoder),
        "source_sha256": sha256,
        "version": version(),
    }
    if rescale:
        metadata["rescaled"] = max(grown.values())
    roles = dict.fromkeys([found.encoder, *found.others.values()])
    report = Report(
        found.source.name, found.encoder, found.prefix, tuple(roles), architecture, to, entries,
        odd_values(backbone), notes,
    )  # fmt: skip

    def check(written: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        report.proof = _prove(backbone, written, architecture, meta, to, grown if rescale else {})
        if not report.proof.holds:
            oddity = f" ({report.warnings[0]})" if report.warnings else ""
            raise CheckpointError(
                f"the converted network differs from the source by {report.proof.excess}{oddity}; "
                "nothing was written.",
                kind="proof",
                details=str(report.proof),
            )

    return Converted(result, metadata, report), check


def _owned(tensor: Tensor) -> Tensor:
    """Return a contiguous float32 (counters: int64) copy, independent of the mapped file."""
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _prove(
    backbone: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    architecture: Architecture,
    metadata: Mapping[str, Any],
    to: str,
    divided: Mapping[str, float],
) -> Proof:
    """Compare the source with the written file, as its metadata describe it, in both libraries."""
    statistics = {k: tuple(metadata[k]) for k in ("pixel_mean", "pixel_std")}
    if to == "detectron2":
        target = Architecture.of_metadata(metadata)
        return prove(backbone, written, architecture, target, divided=divided, **statistics)
    theirs = {str(to_detectron2(name)): tensor for name, tensor in backbone.items()}
    inverse = {name: 1 / factor for name, factor in divided.items()}
    return prove(written, theirs, architecture, architecture, divided=inverse, **statistics)


def _read_back(path: Path, to: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if to == "detectron2":
        weights = load_detectron2_weights(path)
        return weights.tensors, weights.metadata or {}
    tree = read_checkpoint(path)
    return {k: v for k, v in tree.items() if isinstance(v, Tensor)}, own_metadata(tree) or {}

"""Numerical proof that a network in torchvision's layout and Detectron2's compute the same.

The torchvision side is written with ``torch.nn.functional``, directly on the named tensors: it
supports all widths, unlike torchvision's class, and shares no code with Detectron2's modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_common.backbone.architecture import Architecture, Layer, to_detectron2
from moco_common.reader.errors import CheckpointError
from moco_det.conversion.rescale import running_factors

FEATURES = ("stem", "res2", "res3", "res4", "res5")
TOLERANCE = 1e-4
EPS_TOLERANCE = 1e-2
_MOMENTUM, _EPS = 0.1, 1e-5  # torch.nn.BatchNorm2d's defaults, in torchvision and in Detectron2


@dataclass(frozen=True)
class Proof:
    """Largest relative differences, max|a - b| / max|a|, between the two networks.

    Attributes:
        eval: output of each stage (stem, res2 to res5) with running statistics.
        train: output of each stage with batch statistics.
        statistics: running statistics of each stage after one training step.
        eps: effect of the norms' eps in a rescaled network, in eval and train mode. Such a network
            is compared with its source under an eps scaled to match; this is the effect of that
            scaling.
    """

    eval: dict[str, float]
    train: dict[str, float]
    statistics: dict[str, float]
    eps: float = 0.0

    @property
    def worst(self) -> float:
        """The largest of all differences; infinite if one is NaN."""
        values = [*self.eval.values(), *self.train.values(), *self.statistics.values()]
        return max(v if v == v else float("inf") for v in values)

    @property
    def holds(self) -> bool:
        """True if all differences are within `TOLERANCE` and that of eps in `EPS_TOLERANCE`."""
        return self.worst <= TOLERANCE and self.eps <= EPS_TOLERANCE

    @property
    def excess(self) -> str:
        """The value that is too large, and its limit."""
        if self.worst <= TOLERANCE:
            why = "because the eps of the norms has more effect on divided weights"
            return f"{self.eps:.1e} (limit {EPS_TOLERANCE:.0e}), {why}"
        return f"{self.worst:.1e} (limit {TOLERANCE:.0e})"

    def __str__(self) -> str:
        columns = ((self.eval, 10), (self.train, 10), (self.statistics, 15))
        lines = ["proof        eval     train  BN statistics   (largest relative difference)"]
        lines += [
            f"  {name:<7}" + "".join(f"{c[name]:>{w}.1e}" for c, w in columns) for name in FEATURES
        ]
        verdict = "holds" if self.holds else "FAILS"
        if self.eps:
            lines.append(
                f"  eps    {self.eps:>10.1e}: effect of rescaling, limit {EPS_TOLERANCE:.0e}"
            )
        return "\n".join([*lines, f"  {verdict}: {self.worst:.1e}, limit {TOLERANCE:.0e}"])


def resnet_features(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    images: Tensor,
    *,
    training: bool,
    factors: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Run a ResNet in torchvision's layout directly on its state dict.

    Args:
        tensors: float32 tensors by torchvision name.
        architecture: the network.
        images: normalised float32 images (N, 3, H, W).
        training: whether to use batch statistics and update the running ones in place.
        factors: name of a convolution -> factor whose square multiplies the eps of its norm.

    Returns:
        Outputs of "stem" (after pooling) and "res2" to "res5", (N, C, H / stride, W / stride).
    """

    def conv_norm(x: Tensor, layer: Layer) -> Tensor:
        weight = tensors[f"{layer.conv}.weight"]
        x = F.conv2d(x, weight, None, layer.stride, layer.kernel // 2, 1, layer.groups)
        gamma, beta = tensors[f"{layer.norm}.weight"], tensors[f"{layer.norm}.bias"]
        mean, var = tensors[f"{layer.norm}.running_mean"], tensors[f"{layer.norm}.running_var"]
        eps = _EPS * (factors or {}).get(layer.conv, 1.0) ** 2
        return F.batch_norm(x, mean, var, gamma, beta, training, _MOMENTUM, eps)

    x = F.relu(conv_norm(images, architecture.stem))
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    outputs = {"stem": x}
    stages = zip(FEATURES[1:], architecture.stages(), strict=True)
    for feature, (_, _, blocks, shortcuts) in stages:
        for block, shortcut in zip(blocks, shortcuts, strict=True):
            identity = x if shortcut is None else conv_norm(x, shortcut)
            for layer in block[:-1]:
                x = F.relu(conv_norm(x, layer))
            x = F.relu(conv_norm(x, block[-1]) + identity)
        outputs[feature] = x
    return outputs


def build_detectron2(architecture: Architecture) -> torch.nn.Module:
    """Build Detectron2's network of an architecture on the meta device.

    It is built from a config, as in a detector, except for ResNet-18 and -34 of other widths than
    64, which a config cannot express.
    """
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import (
        BasicBlock,
        BasicStem,
        ResNet,
        build_resnet_backbone,
    )

    a = architecture
    network: torch.nn.Module
    with torch.device("meta"):
        if a.block == "bottleneck" or a.res2_out_channels == 64:
            resnets: dict[str, Any] = {k.upper(): v for k, v in a.metadata().items()}
            resnets |= {"NORM": "BN", "OUT_FEATURES": list(FEATURES)}
            cfg = get_cfg()
            for key, value in resnets.items():
                cfg.MODEL.RESNETS[key] = value
            cfg.MODEL.BACKBONE.FREEZE_AT = 0
            network = build_resnet_backbone(cfg, ShapeSpec(channels=3))
            return network
        stages, n_in = [], a.stem_out_channels
        for stage, count in enumerate(a.blocks):
            n_out = a.res2_out_channels * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            stages.append(
                ResNet.make_stage(
                    BasicBlock,
                    count,
                    stride_per_block=strides,
                    in_channels=n_in,
                    out_channels=n_out,
                    norm="BN",
                )
            )
            n_in = n_out
        stem = BasicStem(3, a.stem_out_channels, norm="BN")
        network = ResNet(stem, stages, out_features=list(FEATURES))
        return network


def prove(
    torchvision: Mapping[str, Tensor],
    detectron2: Mapping[str, Tensor],
    source: Architecture,
    target: Architecture | None = None,
    *,
    pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53),
    pixel_std: tuple[float, ...] = (58.395, 57.12, 57.375),
    divided: Mapping[str, float] | None = None,
) -> Proof:
    """Run both networks, in eval and in train mode, on the same generated images.

    Args:
        torchvision: backbone tensors by torchvision name.
        detectron2: backbone tensors by Detectron2 name, complete and without others.
        source: architecture of the first network.
        target: architecture of the second, from the converted file's metadata; ``source`` by
            default.
        pixel_mean, pixel_std: statistics that normalise the images, on the scale 0 to 255.
        divided: torchvision name of a convolution -> factor by which its weights are smaller in
            the second network (see `moco_det.conversion.rescale`).

    Returns:
        The differences; :attr:`Proof.holds` is False if they are too large.

    Raises:
        CheckpointError: a tensor of Detectron2's network is missing, has a different shape or is
            unexpected.
    """
    ours = {name: value.float() for name, value in torchvision.items()}
    network = build_detectron2(target or source)
    _load(network, detectron2)
    images = (_images() - torch.tensor(pixel_mean).view(3, 1, 1)) / torch.tensor(pixel_std).view(
        3, 1, 1
    )
    with torch.no_grad():
        outputs = {False: resnet_features(ours, source, images, training=False, factors=divided)}
        evaluated = _differences(outputs[False], network.eval()(images))
        # Training updates the running statistics: let it update copies.
        before = dict(ours)
        ours |= {k: v.clone() for k, v in ours.items() if "running_" in k}
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for name, value in module.named_buffers(recurse=False):
                    setattr(module, name, value.clone())
        outputs[True] = resnet_features(ours, source, images, training=True, factors=divided)
        trained = _differences(outputs[True], network.train()(images))
        eps = _eps_matters(before, source, images, outputs) if divided else 0.0
    state = network.state_dict()
    statistics = dict.fromkeys(FEATURES, 0.0)
    smaller = running_factors(source, divided) if divided else {}
    for name, value in ours.items():
        other = to_detectron2(name)
        if "running_" in name and other is not None:
            stage = other.split(".")[0]
            value = value / smaller.get(name, 1.0)
            statistics[stage] = _max(statistics[stage], _difference(value, state[other]))
    return Proof(evaluated, trained, statistics, eps)


def _eps_matters(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    images: Tensor,
    outputs: Mapping[bool, dict[str, Tensor]],
) -> float:
    """Return the largest difference of ``outputs`` (keyed by ``training``) from those with the
    default eps."""
    worst = 0.0
    for training, scaled in outputs.items():
        copies = {k: v.clone() if "running_" in k else v for k, v in tensors.items()}
        plain = resnet_features(copies, architecture, images, training=training)
        worst = _max(worst, max(_differences(plain, scaled).values()))
    return worst


def _load(network: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    wanted = network.state_dict()
    state = dict(tensors)
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.tensor(0))
        elif name not in state:
            raise CheckpointError(
                f"Detectron2's network requires {name} of shape {tuple(tensor.shape)}, which is "
                "missing.",
                kind="missing_tensor",
                key=name,
            )
        elif state[name].shape != tensor.shape:
            raise CheckpointError(
                f"Detectron2's network requires {name} of shape {tuple(tensor.shape)}, not "
                f"{tuple(state[name].shape)}.",
                kind="shape",
                key=name,
            )
    for name in state.keys() - wanted.keys():
        raise CheckpointError(
            f"Detectron2's network has no place for {name}.", kind="unknown_tensor", key=name
        )
    network.load_state_dict(state, strict=True, assign=True)


def _images() -> Tensor:
    """Generate images (2, 3, 96, 96) in [0, 255] with smooth structure and pixel noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, size=(96, 96), mode="bilinear", align_corners=False)
    noise = torch.randn(2, 3, 96, 96, generator=generator)
    return (118 + 50 * smooth + 15 * noise).clamp(0, 255)


def _differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    return {name: _difference(ours[name], theirs[name]) for name in FEATURES}


def _difference(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| / max|a|; NaN if either tensor holds a NaN."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def _max(a: float, b: float) -> float:
    return b if b != b else max(a, b)  # keeps NaN

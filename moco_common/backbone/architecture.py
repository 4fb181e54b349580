"""The architecture of a ResNet, determined from its tensors, and its two naming schemes.

Canonical names are torchvision's (``conv1``, ``bn1``, ``layer1.0.conv1``, ...); Detectron2's are
``stem.conv1``, ``stem.conv1.norm``, ``res2.0.conv1``, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from moco_common.backbone.resnet import BLOCKS_PER_STAGE, depth_of, has_bottlenecks
from moco_common.reader.errors import CheckpointError

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
_TORCHVISION = re.compile(r"(?:layer([1-4])\.(\d+)\.)?(conv|bn|downsample\.)(\d)\.(\w+)")
_DETECTRON2 = re.compile(r"(?:stem|res([2-5])\.(\d+))\.(conv\d|shortcut)(\.norm)?\.(\w+)")
_SEQUENTIAL = {"0": "conv1", "1": "bn1", **{str(3 + n): f"layer{n}" for n in (1, 2, 3, 4)}}


def to_detectron2(name: str) -> str | None:
    """Convert a torchvision name, such as ``layer1.0.downsample.1.bias``, to Detectron2's
    (``res2.0.shortcut.norm.bias``); return None if it is not a backbone tensor's."""
    match = _TORCHVISION.fullmatch(name)
    if match is None:
        return None
    stage, block, kind, index, leaf = match.groups()
    owner = f"res{int(stage) + 1}.{block}" if stage else "stem"
    if kind == "downsample.":
        return f"{owner}.shortcut{('', '.norm')[int(index)]}.{leaf}" if int(index) < 2 else None
    return f"{owner}.conv{index}{'.norm' if kind == 'bn' else ''}.{leaf}"


def from_detectron2(name: str) -> str | None:
    """Invert :func:`to_detectron2`."""
    match = _DETECTRON2.fullmatch(name)
    if match is None:
        return None
    stage, block, conv, norm, leaf = match.groups()
    owner = f"layer{int(stage) - 1}.{block}." if stage else ""
    if conv == "shortcut":
        return f"{owner}downsample.{1 if norm else 0}.{leaf}" if stage else None
    return f"{owner}{conv.replace('conv', 'bn') if norm else conv}.{leaf}"


def from_sequential(name: str) -> str | None:
    """Convert a name in ``nn.Sequential(*resnet.children())``, such as ``4.0.conv1.weight``, to
    torchvision's (``layer1.0.conv1.weight``); return None if it is not a backbone tensor's."""
    index, _, rest = name.partition(".")
    return from_torchvision(f"{_SEQUENTIAL[index]}.{rest}") if index in _SEQUENTIAL else None


def from_torchvision(name: str) -> str | None:
    """Return the name itself if it is a backbone tensor's, else None."""
    return name if _TORCHVISION.fullmatch(name) else None


@dataclass(frozen=True)
class Layer:
    """A convolution and the norm that follows it."""

    conv: str  # torchvision name
    norm: str
    out_channels: int
    in_channels: int  # of all groups together
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the convolution's weight: (out, in / groups, kernel, kernel)."""
        return self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel


@dataclass(frozen=True)
class Architecture:
    """A ResNet that Detectron2 can represent; the fields are named after its config keys."""

    depth: int
    num_groups: int
    width_per_group: int
    stem_out_channels: int
    res2_out_channels: int
    stride_in_1x1: bool = False

    @property
    def block(self) -> str:
        """``basic`` (ResNet-18 and -34) or ``bottleneck``."""
        return "bottleneck" if has_bottlenecks(self.depth) else "basic"

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of blocks in res2 to res5."""
        return BLOCKS_PER_STAGE[self.depth]

    def __str__(self) -> str:
        width = self.stem_out_channels / 64
        if self.num_groups > 1:
            name = f"ResNeXt-{self.depth} {self.num_groups}x{self.width_per_group}d"
        elif self.block == "bottleneck" and self.width_per_group != self.res2_out_channels / 4:
            name = f"Wide ResNet-{self.depth}-{4 * self.width_per_group / self.res2_out_channels:g}"
        else:
            name = f"ResNet-{self.depth}"
        return name if width == 1 else f"{name}, width x{width:g}"

    def stages(self) -> Iterator[tuple[str, int, list[list[Layer]], list[Layer | None]]]:
        """Yield ``("layer1", stride, blocks, shortcuts)`` by stage; a block is a list of layers."""
        in_channels, out_channels = self.stem_out_channels, self.res2_out_channels
        inner = self.num_groups * self.width_per_group
        for stage, count in enumerate(self.blocks, start=1):
            first_stride = 1 if stage == 1 else 2
            blocks, shortcuts = [], []
            for index in range(count):
                stride, at = (first_stride if index == 0 else 1), f"layer{stage}.{index}"
                blocks.append(self._block(at, in_channels, inner, out_channels, stride))
                shortcut = None
                if in_channels != out_channels:
                    names = f"{at}.downsample.0", f"{at}.downsample.1"
                    shortcut = Layer(*names, out_channels, in_channels, 1, stride)
                shortcuts.append(shortcut)
                in_channels = out_channels
            yield f"layer{stage}", first_stride, blocks, shortcuts
            out_channels, inner = 2 * out_channels, 2 * inner

    def _block(self, at: str, n_in: int, inner: int, n_out: int, stride: int) -> list[Layer]:
        def layer(index: int, *sizes: int) -> Layer:
            return Layer(f"{at}.conv{index}", f"{at}.bn{index}", *sizes)

        if self.block == "basic":
            return [layer(1, n_out, n_in, 3, stride), layer(2, n_out, n_out, 3)]
        first, second = (stride, 1) if self.stride_in_1x1 else (1, stride)
        return [
            layer(1, inner, n_in, 1, first),
            layer(2, inner, inner, 3, second, self.num_groups),
            layer(3, n_out, inner, 1),
        ]

    @property
    def stem(self) -> Layer:
        """The first layer: 7x7 with stride 2."""
        return Layer("conv1", "bn1", self.stem_out_channels, 3, 7, 2)

    def layers(self) -> Iterator[Layer]:
        """Yield each convolution with its norm, in torchvision's order."""
        yield self.stem
        for _, _, blocks, shortcuts in self.stages():
            for block, shortcut in zip(blocks, shortcuts, strict=True):
                yield from block
                if shortcut is not None:
                    yield shortcut

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor that the network needs, by torchvision name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers():
            shapes[f"{layer.conv}.weight"] = layer.shape
            shapes |= {f"{layer.norm}.{leaf}": (layer.out_channels,) for leaf in NORM_TENSORS}
        return shapes

    def metadata(self) -> dict[str, Any]:
        """Return the part of a converted file's metadata that describes the network."""
        return asdict(self)

    @staticmethod
    def of_metadata(metadata: Mapping[str, Any]) -> Architecture:
        """Build the architecture from a file's metadata, the inverse of :meth:`metadata`."""
        return Architecture(**{key: metadata[key] for key in Architecture.__dataclass_fields__})


def detect(
    tensors: Mapping[str, Tensor], *, names: Mapping[str, str], stride_in_1x1: bool = False
) -> Architecture:
    """Determine the architecture from the shapes of the tensors.

    Args:
        tensors: by torchvision name.
        names: torchvision name -> name in the file, for error messages.
        stride_in_1x1: True if a bottleneck's stride is in its first convolution, which cannot be
            seen from shapes.

    Raises:
        CheckpointError: Detectron2 cannot represent this ResNet, or a tensor that determines the
            architecture is missing.
    """

    def refuse(what: str, key: str | None = None) -> CheckpointError:
        return CheckpointError(
            f"the file holds {what}, which Detectron2's ResNet cannot represent: pre-train a plain "
            "ResNet, ResNeXt or wide ResNet with batch normalisation.",
            kind="unsupported",
            key=key,
        )

    def need(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(
                f"{name} is missing from the file, so its architecture cannot be determined.",
                kind="missing_tensor",
                key=name,
            )
        return tuple(tensors[name].shape)

    stem = need("conv1.weight")
    if len(stem) != 4:
        raise refuse(f"a first convolution of shape {stem} ({names['conv1.weight']})")
    if stem[1] != 3:
        raise refuse(f"a ResNet for {stem[1]}-channel images ({names['conv1.weight']})")
    if stem[2:] == (3, 3):
        kind = "a deep stem (ResNet-C, -D)" if "conv2.weight" in tensors else "a CIFAR stem"
        raise refuse(f"a ResNet with {kind}: a 3x3 first convolution ({names['conv1.weight']})")
    if stem[2:] != (7, 7):
        raise refuse(f"a ResNet with a {stem[2]}x{stem[3]} first convolution")
    if not any(name.endswith(("running_mean", "running_var")) for name in tensors):
        raise refuse("a ResNet with GroupNorm (no norm has running statistics)")

    kind = "bottleneck" if "layer1.0.conv3.weight" in tensors else "basic"
    counts = tuple(
        len({n.split(".")[1] for n in tensors if n.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    depth = depth_of(counts, kind == "bottleneck")
    if depth is None:
        n = 2 + (3 if kind == "bottleneck" else 2) * sum(counts)
        if 0 in counts:
            raise refuse(f"an incomplete ResNet (blocks per stage: {counts})")
        raise refuse(
            f"a ResNet-{n} ({kind} blocks {counts}; supported depths: 18, 34, 50, 101, 152)"
        )
    if kind == "basic":
        out = need("layer1.0.conv2.weight")[0]
        return Architecture(depth, 1, 64, stem[0], out, stride_in_1x1)
    inner, group_width = need("layer1.0.conv2.weight")[:2]
    if not group_width or inner % group_width:
        raise refuse(f"grouped convolutions of {inner} channels by {group_width}")
    out = need("layer1.0.conv3.weight")[0]
    return Architecture(depth, inner // group_width, group_width, stem[0], out, stride_in_1x1)

"""Checkpoints for the converter's tests: torchvision's own shapes, at any width."""

import math
from collections.abc import Iterable

import torch
import torchvision
from torch import Tensor

ARCHITECTURES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
)


def state_dict(name: str = "resnet18", width: float = 0.125, seed: int = 0) -> dict[str, Tensor]:
    """torchvision's state dict with every channel count scaled, and statistics of a trained net."""
    with torch.device("meta"):
        shapes = getattr(torchvision.models, name)(num_classes=10).state_dict()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for key, meta in shapes.items():
        size = list(meta.shape)
        if key not in ("fc.bias",) and size:
            size[0] = size[0] if key == "fc.weight" else math.ceil(size[0] * width)
        if len(size) > 1 and key != "conv1.weight":
            size[1] = math.ceil(size[1] * width)
        noise = torch.randn(size, generator=generator)
        if key.endswith("num_batches_tracked"):
            tensors[key] = torch.tensor(100 + seed)
        elif len(size) == 4:
            tensors[key] = noise * (2 / noise[0].numel()) ** 0.5
        elif key.endswith(("running_var", ".weight")):
            tensors[key] = 0.5 + torch.rand(size, generator=generator)
        else:
            tensors[key] = 0.1 * noise
    return tensors


def backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.startswith("fc.")}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def sequential(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ``nn.Sequential(*list(resnet.children())[:-1])`` names them."""
    children = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return {
        f"{children.index(key.split('.')[0])}.{key.split('.', 1)[1]}": value
        for key, value in backbone(tensors).items()
    }


def linear(name: str, *sizes: int) -> dict[str, Tensor]:
    """A head's tensors: ``name.weight`` and ``name.bias``."""
    return {f"{name}.weight": torch.randn(*sizes), f"{name}.bias": torch.randn(sizes[0])}


def reference_conversion(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names into Detectron2's, by hand: the stem's, then the blocks' parts."""
    renamed = {}
    for key, value in tensors.items():
        parts = key.split(".")
        if parts[0] in ("conv1", "bn1"):
            owner, kind, leaf = ["stem"], parts[0], parts[1:]
        else:
            owner, kind, leaf = [f"res{int(parts[0][-1]) + 1}", parts[1]], parts[2], parts[3:]
        if kind == "downsample":
            unit, leaf = (["shortcut"], ["shortcut", "norm"])[int(leaf[0])], leaf[1:]
        else:
            unit = [kind] if kind.startswith("conv") else [f"conv{kind[-1]}", "norm"]
        renamed[".".join([*owner, *unit, *leaf])] = value
    return renamed


def same(a: dict[str, Tensor], b: dict[str, Tensor], names: Iterable[str] | None = None) -> bool:
    """Bit for bit, names included."""
    keys = set(a) if names is None else set(names)
    return keys == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in b)

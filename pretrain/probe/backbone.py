"""A frozen backbone, from whatever holds its weights."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from moco_common.backbone.resnet import depth_of
from moco_common.config import parse_yaml
from moco_common.errors import UserError
from moco_common.reader.errors import CheckpointError
from moco_common.reader.formats import read_checkpoint
from moco_common.text import counted
from pretrain.checkpoint.format import FORMAT
from pretrain.modeling.resnet import ResNet

RANDOM = "random"
LARGEST_CROP = 1 << 14  # pixels
_OURS = FORMAT.rpartition("/")[0] + "/"  # in any version: weights and configuration stay there
_METADATA = ("metadata", "__metadata__")
_BACKBONE = re.compile(r"(conv1|bn1|layer[1-4]\.\d+\.(conv|bn|downsample)[.\d]*)\.")


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `ResNet` that make a network of these tensors' names and shapes.

    Raises:
        UserError: no ResNet of this project has them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    blocks = tuple(
        len({name.split(".")[1] for name in shapes if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    bottleneck = "layer1.0.conv3.weight" in shapes
    depth = depth_of(blocks, bottleneck)
    last, expansion = ("conv3", 4) if bottleneck else ("conv2", 1)
    names = ["conv1.weight", *(f"layer{stage}.0.{last}.weight" for stage in (1, 2, 3, 4))]
    inner = shapes.get("layer1.0.conv2.weight", ())
    if depth is None or len(inner) != 4 or any(name not in shapes for name in names):
        raise UserError(
            f"the tensors make no ResNet-18, 34, 50, 101 or 152 in torchvision's names (blocks a "
            f"stage: {blocks}): convert the file with tools/convert.py --to torchvision first."
        )
    # Channels are whole numbers round(w * 64), ..., round(w * 512): any w that gives all of them.
    channels = [shapes[names[0]][0], *(shapes[name][0] / expansion for name in names[1:])]
    full = (64, 64, 128, 256, 512)
    low = max((c - 0.5) / f for c, f in zip(channels, full, strict=True))
    high = min((c + 0.5) / f for c, f in zip(channels, full, strict=True))
    groups = inner[0] // inner[1] if bottleneck else 1
    return {
        "depth": depth,
        "width": (low + high) / 2,
        "groups": groups,
        "width_per_group": round(64 * inner[1] / channels[1]) if bottleneck else 64,
    }


def build_backbone(tensors: Mapping[str, Tensor]) -> ResNet:
    """A ResNet without a head, in evaluation mode, frozen, that holds these very tensors.

    Draws no random number: the global generator is as it was.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        network = ResNet(**architecture(tensors))
    wanted = network.state_dict()
    missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        kind, names = ("lacks", missing) if missing else ("has no place for", unknown)
        raise UserError(
            f"the ResNet {kind} {counted(len(names), 'tensor')}, the first is {names[0]}."
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{name} is {tuple(tensor.shape)}, where this ResNet has "
                f"{tuple(wanted[name].shape)}."
            )
    complete = {
        name: tensors.get(name, torch.zeros((), dtype=torch.long)).to(wanted[name].dtype)
        for name in wanted
    }
    network.load_state_dict(complete, assign=True)
    return network.requires_grad_(False).eval()


def backbone_of(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The backbone's tensors of a state dict, without ``prefix``; a head (``fc``) stays behind.

    Raises:
        UserError: under the prefix there is something that is neither.
    """
    found = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not name.startswith(prefix):
            continue
        bare = name.removeprefix(prefix)
        if _BACKBONE.match(bare) and isinstance(tensor, Tensor):
            found[bare] = tensor
        elif not bare.startswith("fc."):
            raise UserError(
                f"{name} belongs to no ResNet in torchvision's names: convert the file with "
                f"tools/convert.py --to torchvision first."
            )
    return found


def load_backbone(path: str | os.PathLike[str]) -> tuple[ResNet, int | None]:
    """Read a frozen backbone, executing nothing.

    Args:
        path: a checkpoint of this project (its ``encoder_q`` is taken, whatever the method), or
            weights under torchvision's names: .pth or .safetensors, as tools/convert.py
            --to torchvision writes them.

    Returns:
        the backbone, and the crop size in pixels that a checkpoint of ours was trained with.

    Raises:
        UserError: missing, damaged, or holding something else.
    """
    crop_size = None
    try:
        content = read_checkpoint(path)
        if isinstance(content, dict) and str(content.get("format")).startswith(_OURS):
            crop_size = _crop_size(content.get("config"))
            state = content.get("state_dict")
            tensors = backbone_of(state if isinstance(state, dict) else {}, "encoder_q.")
        else:
            if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
                content = content["state_dict"]
            if isinstance(content, dict):  # what tools/convert.py adds
                content = {k: v for k, v in content.items() if k not in _METADATA}
            if not isinstance(content, dict) or not all(
                isinstance(tensor, Tensor) for tensor in content.values()
            ):
                raise UserError(
                    "it holds no state dict: convert it with tools/convert.py --to torchvision."
                )
            tensors = backbone_of(content)
        # Copies: the file may change or vanish while its mapped tensors are in use.
        return build_backbone({name: tensor.clone() for name, tensor in tensors.items()}), crop_size
    except CheckpointError as error:
        raise UserError(f"{error} Name a checkpoint, or `{RANDOM}`.") from None
    except UserError as error:
        raise UserError(f"{path} cannot be probed: {error}") from None


def _crop_size(config: Any) -> int:
    """Return INPUT.CROP_SIZE of a configuration in YAML."""
    try:
        size = parse_yaml(str(config))["INPUT"]["CROP_SIZE"]
    except (yaml.YAMLError, TypeError, LookupError):
        size = None
    if not isinstance(size, int) or not 1 <= size <= LARGEST_CROP:
        raise UserError("its configuration states no crop size: use another checkpoint.")
    return size


def random_backbone(seed: int, **arguments: Any) -> ResNet:
    """An untrained ResNet; ``arguments`` as of `ResNet`. The global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet(**arguments).requires_grad_(False).eval()


@torch.no_grad()
def fit_batch_norm(backbone: ResNet, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics by the averages over these batches, with weights as they are.

    An untrained network with the statistics of its constructor (mean 0, variance 1) does not
    normalise at all; this makes it the baseline that training starts from.

    Args:
        batches: (N, 3, H, W) uint8, N >= 2.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    device = next(backbone.parameters()).device
    for norm in norms:
        norm.reset_running_stats()
    backbone.train()
    for count, images in enumerate(batches, start=1):
        for norm in norms:  # 1/count: the mean over all batches so far
            norm.momentum = 1 / count
        backbone(images.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    backbone.eval()


def digest(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer: names, shapes, bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[str]:
    """Proves that what runs inside changes neither parameters nor BN statistics.

    Raises:
        RuntimeError: they differ afterwards.
    """
    before = digest(backbone)
    yield before
    if digest(backbone) != before:
        raise RuntimeError("the frozen backbone changed while its features were used")

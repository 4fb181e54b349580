"""Loading of a backbone file into a model, and of the settings that it implies.

A backbone file holds ``stem.*`` and ``res2.*`` to ``res5.*``. Where they belong in a model depends
on its heads: a C4 model has ``backbone.res4.*`` but ``roi_heads.res5.*``, an FPN model
``backbone.bottom_up.res5.*``. Names are matched exactly, not by Detectron2's suffix heuristic.
"""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from moco_common.backbone.pixel_settings import SIZES
from moco_common.backbone.resnet import depth_of
from moco_common.errors import UserError
from moco_det.config.defaults import flatten
from moco_det.conversion import load_detectron2_weights

# Raised by iopath for a file or a URL that it cannot fetch.
_FETCHING = (OSError, HTTPException, ValueError, LookupError, AssertionError, RuntimeError)
# A backbone tensor in any module; the extra norm (res5.norm.*) does not match.
_BACKBONE = re.compile(r"(?:^|.*\.)((?:stem\.conv1|res[2-5]\.\d+)\..+)$")
_CAFFE2 = re.compile(r"^res\d_\d+_branch2[abc]_w$")
# Metadata of a converted file -> config key.
_METADATA_KEYS = {
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "format": "INPUT.FORMAT",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
}
# Caffe2's files have no metadata; these are the values of Detectron2's configs. Detectron's ResNets
# are MSRA's (BGR images, stride in the 1x1, pixels not scaled), its ResNeXts are not.
_CAFFE2_SETTINGS = {
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "INPUT.FORMAT": "BGR",
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
}
_CAFFE2_RESNEXT = {
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}


class BackboneWeights(NamedTuple):
    """A backbone file: its tensors by Detectron2 name, and the config values that they require."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    source: str
    group_norm: bool = False  # pre-trained with group norm instead of batch norm


def local_file(path: str) -> Path:
    """Return a local copy of a file or URL (``detectron2://``, ``https://``).

    Raises:
        UserError: the file does not exist or cannot be downloaded.
    """
    try:
        local = Path(
            PathManager.get_local_path(str(Path(path).expanduser() if ":" not in path else path))
        )
    except _FETCHING as error:
        raise UserError(f"cannot download the weights {path}: {error}.") from error
    if not local.is_file():
        raise UserError(f"the weights file {path} does not exist: check MODEL.WEIGHTS.")
    return local


def read_backbone(path: str) -> BackboneWeights:
    """Read a converted backbone file, or one of Detectron2's own (Caffe2 names included).

    Raises:
        UserError: the file does not exist, is not a backbone, or its metadata contradict its
            tensors.
    """
    weights = load_detectron2_weights(local_file(path))
    tensors = dict(weights.tensors)
    caffe2 = any(_CAFFE2.match(name) for name in tensors)
    # Caffe2's batch norms have no statistics either: they are folded into scale and bias.
    group_norm = not any(n.endswith("_bn_s" if caffe2 else "running_mean") for n in tensors)
    if caffe2:
        tensors = dict(zip(convert_basic_c2_names(list(tensors)), tensors.values(), strict=True))
        # Detectron2 drops it too: the norm after this convolution cancels a bias.
        tensors.pop("stem.conv1.bias", None)
    settings = _architecture(tensors, path)
    if caffe2:
        settings |= _CAFFE2_SETTINGS
        settings |= _CAFFE2_RESNEXT if settings["MODEL.RESNETS.NUM_GROUPS"] > 1 else {}
        settings |= {"MODEL.RESNETS.STRIDE_IN_1X1": False} if group_norm else {}
    metadata = weights.metadata or {}
    for key in SIZES:
        found = settings[f"MODEL.RESNETS.{key.upper()}"]
        if metadata.get(key, found) != found:
            raise UserError(
                f"the metadata of {path} state {key} {metadata[key]}, but its tensors have "
                f"{found}: convert it again."
            )
    for key, config_key in _METADATA_KEYS.items():
        if key in metadata:
            settings[config_key] = metadata[key]
    return BackboneWeights(tensors, settings, str(path), group_norm)


def apply_settings(cfg: CfgNode, weights: BackboneWeights, explicit: Collection[str]) -> list[str]:
    """Set the architecture and pixel statistics of the config to those of the weights, in place.

    Args:
        cfg: the config to change.
        weights: the backbone.
        explicit: keys that the user has set.

    Returns:
        ``KEY VALUE`` for each changed key.

    Raises:
        UserError: the user has set one of the keys to a different value.
    """
    taken = []
    for key, value in weights.settings.items():
        old = flatten(cfg)[key]
        if _close(old, value):
            continue
        if key in explicit:
            raise UserError(
                f"{key} is set to {old}, but {weights.source} requires {value}: remove the setting."
            )
        cfg.merge_from_list([key, value])
        taken.append(f"{key} {value}")
    return taken


def check_norm(group_norm: bool, weights: BackboneWeights) -> None:
    """Check that weights and model have the same kind of norm.

    Args:
        group_norm: True if the model has group norm, False if it has batch norm.
        weights: the backbone to load.

    Raises:
        UserError: the kinds differ; the message names the protocol that fits.
    """
    if group_norm and not weights.group_norm:
        raise UserError(
            f"{weights.source} was pre-trained with batch norm, but this model has group norm and "
            "cannot use the running statistics: use the protocol without -GN, weights pre-trained "
            "with group norm (-GN-supervised), or random ones (-GN-random)."
        )
    if weights.group_norm and not group_norm:
        raise UserError(
            f"{weights.source} was pre-trained with group norm and has no statistics for this "
            "model's batch norm: use the protocol's -GN sibling."
        )


def load_backbone(model: nn.Module, weights: BackboneWeights) -> list[str]:
    """Copy a backbone file into a detector; it must provide all tensors of the stem and res2-res5.

    ``num_batches_tracked`` may be missing, and so may all running statistics together: Caffe2's
    files fold them into scale and bias, so mean 0 and variance 1 are correct.

    Returns:
        Names of the model's other tensors: RPN, FPN laterals, heads, the extra norm.

    Raises:
        UserError: backbone tensors are missing, have a different shape, or have no place in the
            model; the message gives names, shapes and the most similar name in the file.
    """
    state = model.state_dict()
    wanted = {m.group(1): name for name in state if (m := _BACKBONE.match(name))}
    if not wanted:
        raise UserError(
            f"the model has no ResNet into which to load {weights.source}: check MODEL.BACKBONE."
        )
    check_norm(not any(short.endswith("running_mean") for short in wanted), weights)
    folded = not any(name.endswith("running_mean") for name in weights.tensors)
    problems = []
    for short, name in wanted.items():
        tensor = weights.tensors.get(short)
        if tensor is None:
            bookkeeping = ("num_batches_tracked", *(("running_mean", "running_var") * folded))
            if not short.endswith(bookkeeping):
                near = difflib.get_close_matches(short, weights.tensors, n=1, cutoff=0.0)
                got = f"{near[0]} {_shape(weights.tensors[near[0]])}" if near else "nothing similar"
                problems.append(f"{name} {_shape(state[name])} (nearest in the file: {got})")
        elif tensor.shape != state[name].shape:
            problems.append(f"{name} {_shape(state[name])} (in the file: {_shape(tensor)})")
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(
            f"{weights.source} does not fit {len(problems)} of the model's {len(wanted)} backbone "
            f"tensors: {problems[0]}{more}; check MODEL.RESNETS.*."
        )
    unused = sorted(n for n in weights.tensors if _BACKBONE.fullmatch(n) and n not in wanted)
    if unused:
        raise UserError(
            f"{weights.source} holds backbone tensors that have no place in the model "
            f"({', '.join(unused[:3])}): set MODEL.RESNETS.* to the pre-trained network."
        )
    with torch.no_grad():
        for short, name in wanted.items():
            if short in weights.tensors:
                state[name].copy_(weights.tensors[short])
    return [name for name in state if name not in set(wanted.values())]


def _architecture(tensors: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Return the config values that describe the ResNet of these tensors."""
    blocks = Counter(
        m.group(1)
        for name in tensors
        if (m := re.fullmatch(r"(res[2-5])\.\d+\.conv1\.weight", name))
    )
    kind = "bottleneck" if "res2.0.conv3.weight" in tensors else "basic"
    depth = depth_of(tuple(blocks[f"res{s}"] for s in range(2, 6)), kind == "bottleneck")
    if depth is None or "stem.conv1.weight" not in tensors:
        counts = ", ".join(f"res{stage} {blocks[f'res{stage}']}" for stage in range(2, 6))
        raise UserError(
            f"{path} is not a converted ResNet-18, -34, -50, -101 or -152 ({kind} blocks: "
            f"{counts}): convert the checkpoint first with tools/convert.py."
        )
    settings = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": tensors["stem.conv1.weight"].shape[0],
        "MODEL.RESNETS.NUM_GROUPS": 1,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    }
    last = "conv3" if kind == "bottleneck" else "conv2"
    settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] = tensors[f"res2.0.{last}.weight"].shape[0]
    if kind == "bottleneck":
        out_channels, group_width = tensors["res2.0.conv2.weight"].shape[:2]
        settings["MODEL.RESNETS.NUM_GROUPS"] = out_channels // group_width
        settings["MODEL.RESNETS.WIDTH_PER_GROUP"] = group_width
    elif settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] != 64:
        raise UserError(
            f"{path} is a ResNet-{depth} of a width other than 64, which Detectron2 cannot build: "
            "use ResNet-50 or deeper for other widths."
        )
    return settings


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))
    return bool(abs(a - b) < 1e-6 if isinstance(a, float) else a == b)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)

"""Settings that cannot be seen from shapes: pixel statistics and the position of the strides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from moco_common.config import MAX_BYTES, parse_yaml
from moco_common.files import parse_json, read_regular

# ImageNet's statistics on the scale 0 to 255, as used by torchvision and the known projects.
DEFAULTS: dict[str, Any] = {
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
    "format": "RGB",
    "stride_in_1x1": False,
}


SIZES = ("depth", "num_groups", "width_per_group", "stem_out_channels", "res2_out_channels")
LARGEST = 1e9  # of a pixel's value


def settings_of(
    path: Path, tree: Any, tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of :data:`DEFAULTS` as stated by the file, and notes on their origin.

    A converted file states them in its metadata, a detector in its buffers and in the
    ``config.yaml`` of its run directory. A converted file also has "source" and "encoder".
    """
    if (metadata := own_metadata(tree)) is not None:
        known = (*DEFAULTS, "source", "encoder")
        stated = {key: value for key, value in metadata.items() if key in known}
        return DEFAULTS | stated, ["pixel statistics and stride position are from its metadata"]
    if source != "Detectron2":
        return dict(DEFAULTS), []
    stated, notes = dict(DEFAULTS), []
    config = _detectron2_config(path.parent / "config.yaml")
    if config:
        notes.append(f"pixel statistics and stride position are from {path.parent}/config.yaml")
    else:
        notes.append(
            "the file states neither the position of the strides nor the pixel statistics, so "
            "torchvision's are assumed: pass --stride-in-1x1 and --format BGR for a network "
            "initialised from MSRA's weights"
        )
        for key in ("pixel_mean", "pixel_std"):
            buffer = next((t for name, t in tensors.items() if name.endswith(key)), None)
            if buffer is not None and buffer.numel() == 3:
                stated[key] = tuple(buffer.flatten().tolist())
    return stated | config, notes


def own_metadata(tree: Any) -> dict[str, Any] | None:
    """Return the metadata of a file that this project converted; None if absent or malformed."""
    if not isinstance(tree, dict):
        return None
    metadata = tree.get("metadata")
    if isinstance(strings := tree.get("__metadata__"), dict):  # safetensors stores only strings
        try:
            metadata = parse_json(strings.get("moco-det", "null"))
        except ValueError:
            return None
    if not isinstance(metadata, dict) or "source_sha256" not in metadata:
        return None
    statistics = [metadata.get("pixel_mean"), metadata.get("pixel_std")]
    sound = (
        all(_three_numbers(values) for values in statistics)
        and isinstance(metadata.get("format"), str)
        and metadata["format"] in ("RGB", "BGR")
        and isinstance(metadata.get("stride_in_1x1"), bool)
        and all(isinstance(metadata.get(key, 0), int) for key in SIZES)
    )
    return metadata if sound else None


def _detectron2_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_yaml(read_regular(path, MAX_BYTES).decode("utf-8"))
        stated = {
            "pixel_mean": config["MODEL"]["PIXEL_MEAN"],
            "pixel_std": config["MODEL"]["PIXEL_STD"],
            "format": config["INPUT"]["FORMAT"],
            "stride_in_1x1": config["MODEL"]["RESNETS"]["STRIDE_IN_1X1"],
        }
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}
    sound = _three_numbers(stated["pixel_mean"]) and _three_numbers(stated["pixel_std"])
    return stated if sound and stated["format"] in ("RGB", "BGR") else {}


def _three_numbers(values: Any) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == 3
        and all(isinstance(v, (int, float)) and abs(v) < LARGEST for v in values)
    )

"""A whole detector's weights: told apart from a backbone's, read, and loaded."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco_common.errors import UserError
from moco_common.reader.formats import read_checkpoint
from moco_det.checkpoint.backbone_weights import load_backbone, local_file, read_backbone
from moco_det.modeling.detector import log


def holds_detector(path: str | Path) -> bool:
    """Whether a file holds a whole detector, not a backbone alone."""
    prefixes = ("backbone.", "roi_heads.", "proposal_generator.")
    tensors = _model(read_checkpoint(local_file(str(path))))
    return any(str(name).removeprefix("module.").startswith(prefixes) for name in tensors)


def read_detector(path: str | Path) -> dict[str, Any]:
    """A detector's checkpoint, ``{"model": {name: tensor}, ...}``, read without executing anything.

    Raises:
        UserError: no such file, or no named tensors in it.
    """
    checkpoint = read_checkpoint(local_file(str(path)))
    model = _model(checkpoint)
    if not model:
        raise UserError(f"{path} holds no named tensors: it is no checkpoint of a detector.")
    return checkpoint if "model" in checkpoint else {"model": model}


def load_detector(model: nn.Module, tensors: Mapping[str, Any], source: str) -> None:
    """Load a whole detector by exact names, nothing missing and nothing left over.

    Raises:
        UserError: a missing or unexpected tensor, or another shape.
    """
    tensors = {k.removeprefix("module."): torch.as_tensor(v) for k, v in tensors.items()}
    state = model.state_dict()
    missing = [n for n in state if n not in tensors and not n.endswith("num_batches_tracked")]
    unexpected = [
        n
        for n in tensors
        if n not in state and "anchor_generator" not in n and n not in ("pixel_mean", "pixel_std")
    ]
    shapes = [
        f"{n} {tuple(tensors[n].shape)} (the model's is {tuple(state[n].shape)})"
        for n in state
        if n in tensors and tensors[n].shape != state[n].shape
    ]
    problems = {"lacks": missing, "has, unknown to the model,": unexpected, "has": shapes}
    for verb, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{source} is a checkpoint of another detector: it {verb} {names[0]}{more}; use "
                "the config.yaml of its run."
            )
    with torch.no_grad():
        for name, value in state.items():
            if name in tensors:
                value.copy_(tensors[name])


def load_weights(model: nn.Module, path: str) -> None:
    """Start a detector from a backbone file or from a whole detector, and say what is new.

    Raises:
        UserError: the file does not fill what it must.
    """
    if holds_detector(path):
        load_detector(model, read_detector(path)["model"], source=path)
        log.info("loaded     %s: the whole detector", path)
        return
    new = load_backbone(model, read_backbone(path))
    count = len(model.state_dict()) - len(new)
    log.info("loaded     %s: all %d backbone tensors", path, count)
    log.info("new        %s", summarise(new))


def summarise(names: Collection[str]) -> str:
    """``"backbone.fpn_lateral (24), roi_heads.res5.norm (5)"``: tensors counted by module."""

    def group(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:3] if parts[1] == "res5" else (parts[0], parts[1].rstrip("2345")))

    return ", ".join(f"{module} ({count})" for module, count in Counter(map(group, names)).items())


def _model(checkpoint: Any) -> dict[str, Any]:
    """The named tensors of a checkpoint, which are under ``model`` or all there is."""
    model = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else {}
    return model if isinstance(model, dict) else {}

"""The weights of a whole detector: recognised, read and loaded."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moco_common.errors import UserError
from moco_common.reader.formats import read_checkpoint
from moco_det.checkpoint.backbone_weights import load_backbone, local_file, read_backbone
from moco_det.modeling.detector import log


def holds_detector(path: str | Path) -> bool:
    """Return True if a file holds a whole detector, False for a backbone."""
    prefixes = ("backbone.", "roi_heads.", "proposal_generator.")
    tensors = _model(read_checkpoint(local_file(str(path))))
    return any(str(name).removeprefix("module.").startswith(prefixes) for name in tensors)


def read_detector(path: str | Path) -> dict[str, Any]:
    """Read a detector's checkpoint, ``{"model": {name: tensor}, ...}``, without executing code.

    Raises:
        UserError: the file does not exist or holds no named tensors.
    """
    checkpoint = read_checkpoint(local_file(str(path)))
    model = _model(checkpoint)
    if not model:
        raise UserError(
            f"{path} is not a detector's checkpoint (it holds no named tensors): check the path."
        )
    return checkpoint if "model" in checkpoint else {"model": model}


def load_detector(model: nn.Module, tensors: Mapping[str, Any], source: str) -> None:
    """Load a whole detector by exact names, with no tensor missing or left over.

    Args:
        model: the detector.
        tensors: its tensors by name, with or without DDP's ``module.`` prefix.
        source: name of the file, for error messages.

    Raises:
        UserError: a tensor is missing, unexpected or has a different shape.
    """
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, (torch.Tensor, np.ndarray)):
            raise UserError(f"{source} is not a detector's checkpoint: {name} is no tensor.")
    tensors = {k.removeprefix("module."): torch.as_tensor(v) for k, v in tensors.items()}
    state = model.state_dict()
    missing = [n for n in state if n not in tensors and not n.endswith("num_batches_tracked")]
    unexpected = [
        n
        for n in tensors
        if n not in state and "anchor_generator" not in n and n not in ("pixel_mean", "pixel_std")
    ]
    shapes = [
        f"{n} {tuple(tensors[n].shape)} (expected {tuple(state[n].shape)})"
        for n in state
        if n in tensors and tensors[n].shape != state[n].shape
    ]
    problems = {"lacks": missing, "has the unexpected tensor": unexpected, "has": shapes}
    for verb, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{source} is a checkpoint of a different detector: it {verb} {names[0]}{more}; "
                "use the config.yaml of its run."
            )
    with torch.no_grad():
        for name, value in state.items():
            if name in tensors:
                value.copy_(tensors[name])


def load_weights(model: nn.Module, path: str) -> None:
    """Load a backbone file or a whole detector into a model, and log which tensors are new.

    Raises:
        UserError: the file cannot be read or does not fit the model.
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
    """Count tensors by module: ``"backbone.fpn_lateral (24), roi_heads.res5.norm (5)"``."""

    def group(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:3] if parts[1] == "res5" else (parts[0], parts[1].rstrip("2345")))

    return ", ".join(f"{module} ({count})" for module, count in Counter(map(group, names)).items())


def _model(checkpoint: Any) -> dict[str, Any]:
    """Return the named tensors of a checkpoint, which are under ``model`` or at the top level."""
    model = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else {}
    return model if isinstance(model, dict) else {}

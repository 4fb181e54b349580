"""Checkpoints: one schema, atomic writes, safe reads, retention.

A checkpoint is a dictionary of tensors and plain values, so that it is read with
``weights_only=True`` and nothing in it is ever executed::

    format      "moco-det/pretrain/1"
    state_dict  the method's: encoder_q.*, encoder_k.*, queue, queue_ptr, ...
    optimizer   the optimiser's state
    step        steps done; with the seed it is the position in the data
    rng         {"torch": [one state a rank]}
    world_size  ranks that wrote it
    config      the resolved configuration, as YAML text
    version     of this project
"""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import UserError

FORMAT = "moco-det/pretrain/1"
LAST = "checkpoint_last.pth"


def save(checkpoint: dict[str, Any], folder: str | os.PathLike[str], keep: int = 2) -> Path:
    """Write ``checkpoint_<step>.pth`` atomically, point `LAST` at it, drop all but ``keep``.

    A reader, or a process killed at any moment, finds either the old file or the new one whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint_{checkpoint['step']:08d}.pth"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".checkpoint_")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    pointer = folder / f".{LAST}.new"
    pointer.unlink(missing_ok=True)
    os.link(path, pointer)  # the same file under a second name: no second copy on the disk
    os.replace(pointer, folder / LAST)
    for old in sorted(folder.glob("checkpoint_[0-9]*.pth"))[:-keep]:
        old.unlink()
    return path


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of this project on the CPU, executing nothing in it.

    Raises:
        UserError: missing, damaged, or not one of ours.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is damaged or holds more than tensors and plain values, and was not read "
            f"({reason}): use an earlier checkpoint of the run."
        ) from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a pre-training checkpoint of this project (format {FORMAT}): "
            f"a run can only be resumed from its own."
        )
    return checkpoint

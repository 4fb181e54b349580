"""Checkpoints written behind the training."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import format as checkpoint


class Snapshots:
    """Copies a run's state into buffers of its own, and writes them in a thread.

    Training waits for the copy only, and, should the one before still be on its way to the disk,
    for that. The buffers are reused: they take the memory of one state. Leaving the context waits
    for the last write, whatever ended the run.

    Args:
        folder: of the run.
        keep: newest checkpoints that stay.

    Attributes:
        last: the newest checkpoint that is whole on the disk, written here; None before the first.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.last: Path | None = None
        self._buffers: Any = None
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._writer:
            self._writer.join()  # and no word of its error: there is another one already

    def reserve(self, state: dict[str, Any]) -> None:
        """Make the buffers for such a state, so that not even the first `take` has to."""
        self._buffers = _copy(state, self._buffers)

    def take(self, state: dict[str, Any]) -> None:
        """Copy the state and start writing it, when the one before is written.

        Raises:
            UserError, OSError: as of `check`.
        """
        self.finish()
        self._buffers = _copy(state, self._buffers)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies from the device have only been asked for
        self._writer = threading.Thread(target=self._write, name="checkpoint")
        self._writer.start()

    def check(self) -> None:
        """Raise what went wrong with the last write, if it is known by now; see
        `checkpoint.save`."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait until what was taken is on the disk; raises as `check`."""
        if self._writer:
            self._writer.join()
            self._writer = None
        self.check()

    def _write(self) -> None:
        try:
            self.last = checkpoint.save(self._buffers, self.folder, keep=self.keep)
        except BaseException as error:  # it is the training thread's to raise
            self._error = error


def _copy(value: Any, buffer: Any) -> Any:
    """``value`` with its tensors copied to the CPU, into the tensors that ``buffer`` has at the
    same place, where they fit."""
    if isinstance(value, dict):
        old = buffer if isinstance(buffer, dict) else {}
        return {key: _copy(item, old.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        fits = isinstance(buffer, list | tuple) and len(buffer) == len(value)
        pairs = zip(value, buffer if fits else [None] * len(value), strict=True)
        return type(value)(_copy(item, old) for item, old in pairs)
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if not _fits(value, buffer):
        pinned = value.device.type == "cuda"  # only to pinned memory a GPU copies by itself
        buffer = torch.empty_like(value, device="cpu", pin_memory=pinned)
    return buffer.copy_(value, non_blocking=True)


def _fits(value: Tensor, buffer: Any) -> bool:
    return isinstance(buffer, Tensor) and (buffer.shape, buffer.dtype, buffer.stride()) == (
        value.shape,
        value.dtype,
        value.stride(),
    )

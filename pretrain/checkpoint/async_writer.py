"""Checkpoints written in the background."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_common import comm
from pretrain.checkpoint import format as checkpoint


class Snapshots:
    """Copies a run's state to buffers of its own and writes them in a thread.

    Training waits only for the copy, and for the previous write if that is still in progress. The
    buffers are reused and take the memory of one state. Leaving the context waits for the last
    write, whatever ended the run.

    Args:
        folder: run directory.
        keep: number of newest checkpoints that are kept.

    Attributes:
        last: the newest checkpoint that this process has written; None before the first.
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
            self._writer.join()  # its error is dropped: another one is already on its way

    def reserve(self, state: dict[str, Any]) -> None:
        """Allocate the buffers for such a state, so that even the first `take` need not."""
        self._buffers = _copy(state, self._buffers)

    def take(self, state: dict[str, Any]) -> None:
        """Wait for the previous write, copy the state and start to write it.

        Raises:
            UserError, OSError: as in `check`.
        """
        self.finish()
        self._buffers = _copy(state, self._buffers)
        if comm.device().type == "cuda":
            torch.cuda.synchronize()  # the copies from the device are asynchronous
        self._writer = threading.Thread(target=self._write, name="checkpoint")
        self._writer.start()

    def check(self) -> None:
        """Raise the error of the last write, if it has failed by now; see `checkpoint.save`."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait until the last state is on the disk; raises as `check` does."""
        if self._writer:
            self._writer.join()
            self._writer = None
        self.check()

    def _write(self) -> None:
        try:
            self.last = checkpoint.save(self._buffers, self.folder, keep=self.keep)
        except BaseException as error:  # raised in the training thread by `check`
            self._error = error


def _copy(value: Any, buffer: Any) -> Any:
    """Return ``value`` with its tensors copied to the CPU, into the tensors at the same place in
    ``buffer`` where these fit."""
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
        pinned = value.device.type == "cuda"  # a GPU copies asynchronously to pinned memory only
        buffer = torch.empty_like(value, device="cpu", pin_memory=pinned)
    return buffer.copy_(value, non_blocking=True)


def _fits(value: Tensor, buffer: Any) -> bool:
    return isinstance(buffer, Tensor) and (buffer.shape, buffer.dtype, buffer.stride()) == (
        value.shape,
        value.dtype,
        value.stride(),
    )

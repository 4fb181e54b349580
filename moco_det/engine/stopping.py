"""Ending a run from outside, with a checkpoint; and no second run in its folder."""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm

from moco_common.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(SystemExit):  # noqa: N818
    """The run was asked to stop and has saved its state.

    Its code is 128 + signal, what a shell reports of a process that the signal ended: 143 for
    SIGTERM, on which schedulers requeue; 138 for SIGUSR1, 130 for Ctrl-C.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopRequest:
    """Whether a scheduler (SIGTERM, SIGUSR1) or a person (Ctrl-C) wants the run to stop."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, signals are noted instead of obeyed; the second Ctrl-C is obeyed."""
        if threading.current_thread() is threading.main_thread():  # Python takes them there only
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            self._restore()

    def obey(self) -> None:
        """From now on signals act at once, as does one that was noted.

        Raises:
            Stopped: there was one.
        """
        self._restore()
        if self.signal:
            raise Stopped(self.signal)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, device: torch.device) -> int:
        """The signal that any process has noted, 0 for none. All processes call it together."""
        if comm.get_world_size() == 1:
            return self.signal
        noted = torch.tensor([self.signal], device=device)
        dist.all_reduce(noted, op=dist.ReduceOp.MAX)
        return int(noted.item())


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep a second process from training in a run's folder.

    The system drops the lock with the process, however that ends.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            # Not flock, whose locks forked loader workers keep when this process is dead.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"another run is at work in {folder} ({file.read().strip() or 'process unknown'}): "
                "wait for it or stop it, or choose another --output-dir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield

"""Being asked to stop: by a scheduler, by a shell, by Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from moco_common import comm

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WORKERS_GRACE = 60  # seconds that a data-loader worker goes on after it was told to end


class Stopped(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and did, with a checkpoint.

    Attributes:
        signal: the number of the signal. ``128 + signal`` is the exit status: what a shell reports
            of a process that this signal killed, so that whatever starts killed jobs again starts
            this one again (143 for SIGTERM, 138 for SIGUSR1, 130 for Ctrl-C).
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal

    @property
    def exit_status(self) -> int:
        """128 and the signal's number, as shells have it."""
        return 128 + self.signal


class Interrupt:
    """While ``with`` lasts, a signal to stop is noted instead of obeyed; the loop asks `agreed`.

    A second Ctrl-C interrupts at once. Outside the main thread, where Python takes no signals,
    this does nothing.
    """

    def __init__(self) -> None:
        self.signal = self._interrupted = 0
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}
        self._pending: Callable[[], int] | None = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """The signal that any rank has noted, 0 for none: the same on every rank.

        To be called once a step by all ranks. With several, it returns what they had noted by the
        call before: so their exchange goes on behind a step and nobody waits for it.
        """
        if comm.world_size() == 1:
            return self.signal
        before, self._pending = self._pending, comm.start_maximum(self.signal)
        return before() if before else 0

    def finish(self) -> None:
        """Wait for the last exchange: at the end of a run, before ranks part."""
        if self._pending:
            self._pending()
            self._pending = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A data-loader worker, forked with our handlers. Schedulers and terminals signal all
            # processes of a job, but the last batches before the checkpoint are still wanted.
            if number == signal.SIGTERM:
                signal.alarm(WORKERS_GRACE)
            return
        if number == signal.SIGINT:
            self._interrupted += 1
            if self._interrupted > 1:
                raise KeyboardInterrupt
        self.signal = self.signal or number

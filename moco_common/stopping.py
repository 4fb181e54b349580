"""Requests to stop a run: from a scheduler, a shell, or Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from moco_common import comm
from moco_common.errors import Stopped

# SIGHUP comes from a terminal or a connection that was closed.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
WAITING_GRACE = 15  # seconds that a run waits for data after a signal; schedulers kill after 30
WORKERS_GRACE = 60  # seconds that a data-loader worker lives on after SIGTERM

__all__ = ["WORKERS_GRACE", "StopRequest", "Stopped", "signals_to_stop"]


T = TypeVar("T")


def signals_to_stop() -> list[signal.Signals]:
    """Return the signals that stop a run; SIGHUP does not under ``nohup``, which ignores it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in _SIGNALS if not (ignored and number is signal.SIGHUP)]


def _leave_terminal() -> None:
    """Discard all further output to a terminal that is gone, where writing would raise EIO."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        try:
            os.ttyname(stream)
        except OSError as error:
            if error.errno == errno.EIO:  # otherwise it is a file or a pipe
                os.dup2(nowhere, stream)
    os.close(nowhere)


class StopRequest:
    """Within ``with``, records a signal to stop instead of obeying it; the loop polls `agreed`.

    A second Ctrl-C interrupts at once. Outside the main thread, where Python delivers no signals,
    it has no effect.

    Attributes:
        signal: the first signal that this process received; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = self._interrupts = 0
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}
        self._pending: Callable[[], int] | None = None
        self._waiting = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._record) for number in signals_to_stop()
            }
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; a signal is obeyed if the next one takes longer than `WAITING_GRACE`,
        since the loop cannot poll `agreed` while it waits.

        Raises:
            Stopped: there was a signal, and no item.
        """
        iterator = iter(items)
        while True:
            self._waiting = True
            try:
                if self.signal:
                    self._limit_wait()
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item

    def agreed(self) -> int:
        """Return the signal that any rank has received, the same on every rank; 0 for none.

        All ranks call this once a step. With several ranks, it returns what they had received by
        the previous call: the exchange runs behind a step, and nobody waits for it.
        """
        if comm.world_size() == 1:
            return self.signal
        before, self._pending = self._pending, comm.start_maximum(self.signal)
        return before() if before else 0

    def finish(self) -> int:
        """Complete the last exchange before the ranks diverge; all ranks call this.

        Returns:
            The signal that any rank had received by the last call of `agreed`; 0 for none.
        """
        pending, self._pending = self._pending, None
        return pending() if pending else 0

    def obey(self) -> None:
        """Let signals act at once from now on, including one received earlier by any rank; all
        ranks call this.

        Raises:
            Stopped: there was one.
        """
        self.__exit__()
        self.finish()
        if number := comm.maximum(self.signal):
            raise Stopped(number)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A data-loader worker, forked with these handlers. Schedulers and terminals signal all
            # processes of a job, but the last batches before the checkpoint are still needed.
            if number == signal.SIGTERM:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(WORKERS_GRACE)
            return
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if number == signal.SIGHUP:
            _leave_terminal()
        self.signal = self.signal or number
        if self._waiting:
            self._limit_wait()

    def _limit_wait(self) -> None:
        signal.signal(signal.SIGALRM, self._give_up)
        signal.alarm(WAITING_GRACE)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if self._waiting and os.getpid() == self._owner:
            name = signal.Signals(self.signal).name
            raise Stopped(
                self.signal,
                f"stopped by {name} while waiting for data, which did not come within "
                f"{WAITING_GRACE} s: check the disk or server that holds them; pass --resume to "
                f"continue from the last checkpoint",
            )

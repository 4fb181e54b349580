"""Exceptions that end a command line without a traceback, and the function that handles them."""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

MISTAKE, INTERRUPTED = 1, 130  # exit statuses; 130 is the shell's 128 + SIGINT
MEMORY = (
    "error: the memory is used up: close other programs, use fewer processes or smaller inputs, "
    "or a machine with more memory."
)
ENDING = 10.0  # seconds after a stop in which further signals are ignored
_DEFAULTS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
}
_last_stop = [0.0]
BUG = "This looks like a bug in moco-det: please report it with the traceback above."


class UserError(Exception):
    """A mistake in the input. The message is one sentence: what, where, and how to fix it.

    Command lines print it after ``error: `` and exit with status 1, without a traceback.
    """


class Stopped(BaseException):
    """Raised when a run has stopped on request; not an error, like KeyboardInterrupt.

    Args:
        signal: number of the signal.
        message: line for the command line to print; empty if the run has reported its end.
    """

    def __init__(self, signal: int, message: str = "") -> None:
        super().__init__(signal, message)
        self.signal, self.message = signal, message

    @property
    def exit_status(self) -> int:
        """128 + signal, as a shell reports for a process killed by that signal, so that whatever
        restarts killed jobs restarts this one: 143 for SIGTERM, 138 for SIGUSR1, 130 for Ctrl-C."""
        return 128 + self.signal


def run_tool(
    work: Callable[[], int | None],
    interrupted: str = "interrupted",
    also: tuple[type[Exception], ...] = (),
) -> int:
    """Run the work of a command line and return its exit status.

    A :class:`UserError` (with its ``details``, where it has any), a stop and an interrupt are
    reported on stderr in one line. Any other exception is a bug: it propagates, and below its
    traceback one line asks to report it.

    Args:
        work: returns an exit status, or None for 0.
        interrupted: the line after Ctrl-C, or after a scheduler's signal outside a training loop.
        also: further exceptions to treat as the user's mistakes, such as OSError for named files.
    """
    mistakes: tuple[type[Exception], ...] = (UserError, *also)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in data may hold what cannot be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _signals_raised(interrupted):
            return work() or 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except Stopped as stopped:
        if stopped.message:
            print(stopped.message, file=sys.stderr)
        return stopped.exit_status
    except BrokenPipeError:  # the reader of the output (head, less) has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr)
        if details := getattr(error, "details", ""):
            print(details, file=sys.stderr)
        return MISTAKE
    except MemoryError:
        print(MEMORY, file=sys.stderr)
        return MISTAKE
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(BUG)
        raise


@contextmanager
def _signals_raised(message: str) -> Iterator[None]:
    """Within ``with``, let SIGTERM and SIGUSR1 raise `Stopped`, as Ctrl-C raises KeyboardInterrupt.

    An error after a signal is its consequence, such as an import that was broken off. Further
    signals do not disturb the end of the process. Ranks of torchrun keep the default: they wait for
    each other outside Python, where no handler runs.
    """
    owner = os.getpid()
    received: list[int] = []
    replaced: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked process ends as it would without this handler
            signal.signal(number, _DEFAULTS[number])
            signal.raise_signal(number)
            return
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(number, message)

    if threading.current_thread() is threading.main_thread() and "WORLD_SIZE" not in os.environ:
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) in (default, _ignore_for_a_while):
                replaced.append(number)
                signal.signal(number, stop)
    stopped = True
    try:
        yield
        stopped = False
    except Exception:
        if received:
            raise Stopped(received[0], message) from None
        stopped = False
        raise
    finally:
        if stopped:
            _last_stop[0] = time.monotonic()
        for number in replaced:
            signal.signal(number, _ignore_for_a_while if received else _DEFAULTS[number])


def _ignore_for_a_while(number: int, frame: FrameType | None) -> None:
    """Ignore a signal after a stop; obey it if the process lives on, such as a notebook."""
    if time.monotonic() - _last_stop[0] > ENDING:
        signal.signal(number, _DEFAULTS[number])
        signal.raise_signal(number)


@atexit.register
def _ignore_for_good() -> None:
    """Ignore signals once the interpreter is dismantled after a stop, when no handler runs."""
    if _last_stop[0]:
        for number in _DEFAULTS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def lost_worker_explained() -> Iterator[None]:
    """Turn torch's error about a data-loading process that was killed into a `UserError`."""
    try:
        try:
            yield
        except (ConnectionResetError, EOFError):  # met before torch has noticed the death
            time.sleep(10.0)  # its signal handler ends this by raising the error below
            raise
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).split(". ")[0].rstrip(".")
        raise UserError(
            f"A data-loading process was lost ({reason}), usually because memory or /dev/shm is "
            f"used up: lower DATALOADER.NUM_WORKERS or free some memory, and resume with --resume."
        ) from None

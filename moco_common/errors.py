"""Exceptions that end a command line without a traceback, and the function that handles them."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MISTAKE, INTERRUPTED = 1, 130  # exit statuses; 130 is the shell's 128 + SIGINT
MEMORY = (
    "error: the memory is used up: close other programs, use fewer processes or smaller inputs, "
    "or a machine with more memory."
)
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
        interrupted: the line after Ctrl-C.
        also: further exceptions to treat as the user's mistakes, such as OSError for named files.
    """
    mistakes: tuple[type[Exception], ...] = (UserError, *also)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in data may hold what cannot be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
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

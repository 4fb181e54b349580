"""The one exception that a user's mistake raises, and what a command line makes of it."""

import os
import sys
from collections.abc import Callable

MISTAKE, INTERRUPTED = 1, 130  # exit statuses; 128 + SIGINT is the shell's


class UserError(Exception):
    """A mistake in the input. The message is one sentence: what, where, and how to mend it.

    Command lines print it after ``error: `` and exit with status 1, without a traceback.
    """


def run_tool(
    work: Callable[[], int | None],
    interrupted: str = "interrupted",
    also: tuple[type[Exception], ...] = (),
) -> int:
    """Do the work of a command line; its exit status.

    A :class:`UserError` (with its ``details``, where it has any) and an interrupt go to stderr as
    one line; any other error is this project's own and keeps its traceback.

    Args:
        work: returns an exit status, or None for 0.
        interrupted: what to say after Ctrl-C.
        also: errors that are the user's here too, such as OSError where files are named.
    """
    mistakes: tuple[type[Exception], ...] = (UserError, *also)
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr)
        if details := getattr(error, "details", ""):
            print(details, file=sys.stderr)
        return MISTAKE

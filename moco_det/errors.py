"""The one exception that a user's mistake raises, and what a command line makes of it."""

import os
import sys
from collections.abc import Callable

MISTAKE, INTERRUPTED = 1, 130  # exit statuses; 128 + SIGINT is the shell's


class UserError(Exception):
    """A mistake in the input. The message is one sentence: what, where, and how to mend it.

    Command lines print it after ``error: `` and exit with status 1, without a traceback.
    """


def run_tool(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do the work of a command line; its exit status.

    A :class:`UserError` and an interrupt become one line on stderr; any other error is this
    project's own and keeps its traceback.

    Args:
        work: returns an exit status, or None for 0.
        interrupted: what to say after Ctrl-C.
    """
    try:
        return work() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

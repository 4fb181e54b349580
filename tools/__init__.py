"""The command lines. Each parses, sets up and launches; the work is done in the packages.

Their imports take seconds, and a Ctrl-C among them finds no `run_tool` yet: it ends in a line here.
"""

import sys
from types import TracebackType


def _say_interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped before anything was begun: start again", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:  # nobody else's is replaced
    sys.excepthook = _say_interrupted

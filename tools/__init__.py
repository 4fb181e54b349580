"""The command lines. Each parses, checks what is cheap to check, imports the work and launches it.

No tool imports torch or Detectron2, which takes seconds, before its arguments are known to be
valid. A Ctrl-C during the imports that come before `run_tool` ends in one line here.
"""

import sys
from types import TracebackType


def _report_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped before anything was begun: start again", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:  # nobody else's is replaced
    sys.excepthook = _report_interrupt

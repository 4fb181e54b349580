"""The end of a command line: a mistake, a stop and a bug."""

import sys
import traceback

import pytest

from moco_common.errors import BUG, Stopped, UserError, run_tool


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such file"), 1, "error: no such file\n"),
        (Stopped(15), 143, ""),
        (Stopped(2, "stopped: start again"), 130, "stopped: start again\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_mistake_and_a_stop_are_one_line_and_a_status(error, status, line, capsys):
    assert run_tool(raising(error)) == status
    assert capsys.readouterr() == ("", line)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_a_bug_keeps_its_traceback_and_asks_to_be_reported_below_it():
    with pytest.raises(KeyError) as error:
        run_tool(raising(KeyError("a fault of ours")))
    lines = "".join(traceback.format_exception(error.value)).splitlines()
    assert "raise error" in "".join(lines)
    assert lines[-1] == BUG

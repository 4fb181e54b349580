"""The end of a command line: a mistake, a stop and a bug."""

import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from moco_common.errors import BUG, Stopped, UserError, lost_worker_explained, run_tool

ROOT = Path(__file__).parents[2]


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


class Deadly(Dataset):
    """A data set whose image 2 kills the process that reads it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def read_from_a_process_that_is_killed():
    """To be run in a process of its own: torch raises its error from a signal handler."""
    with lost_worker_explained():
        list(DataLoader(Deadly(), num_workers=1))


def test_a_killed_data_loading_process_is_one_sentence():
    code = f"from {__name__} import {read_from_a_process_that_is_killed.__name__} as run; run()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = ran.stderr.splitlines()[-1]
    assert re.search(r"UserError: .* was lost \(DataLoader worker .*NUM_WORKERS", last), ran.stderr
    with pytest.raises(RuntimeError, match="another"), lost_worker_explained():
        raise RuntimeError("another")

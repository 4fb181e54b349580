"""The end of a command line: a mistake, a stop and a bug."""

import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from moco_common import errors
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


TOOL = """
import atexit, multiprocessing, os, sys, time
from moco_common.errors import run_tool

def sleep():
    time.sleep(60)

def work():
    if "forks" in sys.argv:
        child = multiprocessing.get_context("fork").Process(target=sleep)
        child.start()
        time.sleep(0.3)
        child.terminate()
        child.join(20)
        print(child.exitcode, flush=True)
    print("working", flush=True)
    try:
        sleep()
    except BaseException:
        if "breaks" in sys.argv:
            raise ImportError("an import was broken off")
        raise

if "slow" in sys.argv:
    atexit.register(time.sleep, 2)
sys.exit(run_tool(work, "stopped: start again"))
"""


@pytest.mark.parametrize(
    ("kind", "number", "count", "status"),
    [
        ("plain", signal.SIGTERM, 1, 143),
        ("plain", signal.SIGUSR1, 1, 138),
        ("plain", signal.SIGINT, 1, 130),
        ("breaks", signal.SIGINT, 1, 130),
        ("breaks", signal.SIGTERM, 1, 143),
        ("slow", signal.SIGINT, 2, 130),
        ("slow", signal.SIGTERM, 2, 143),
        ("forks", signal.SIGTERM, 1, 143),
    ],
)
def test_signals_end_a_tool_in_one_line(kind, number, count, status):
    tool = subprocess.Popen(
        [sys.executable, "-c", TOOL, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        if kind == "forks":
            assert tool.stdout.readline() == "-15\n"
        assert tool.stdout.readline() == "working\n"
        for _ in range(count):
            tool.send_signal(number)
            time.sleep(0.5)
        _, errors = tool.communicate(timeout=30)
    finally:
        tool.kill()
    assert (tool.returncode, errors) == (status, "stopped: start again\n")


def test_a_program_that_lives_on_after_a_stop_obeys_later_signals(monkeypatch):
    assert run_tool(lambda: signal.raise_signal(signal.SIGINT)) == 130
    signal.raise_signal(signal.SIGINT)  # ignored
    monkeypatch.setattr(errors, "ENDING", 0.0)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run_tool(lambda: 0) == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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

"""Real runs of the command line, several ranks as torchrun starts them, each a fork."""

import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch

from pretrain.checkpoint import format as checkpoint
from tests.pretrain.forks import Fork
from tests.pretrain.ranks import free_port, torchrun_environment

TINY = (
    "MODEL.DEPTH 18 MODEL.WIDTH 0.0625 MODEL.BN_GROUPS 2 INPUT.CROP_SIZE 32 MOCO.DIM 8 "
    "MOCO.QUEUE_SIZE 20 SOLVER.BATCH_SIZE 8 SOLVER.MAX_ITER 6 CHECKPOINT.PERIOD 3 "
    "CHECKPOINT.KEEP 9 LOG.PERIOD 1 DATALOADER.NUM_WORKERS 0"
).split()


def write_photographs(folder, count=13):  # not a multiple of the batch
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.jpg"), cv2.resize(coarse, (60, 48)))
    return folder


def _command(argv, output, environment):
    os.setsid()  # a group of its own, workers included
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    os.chdir(environment.get("PWD", "."))
    from tools.pretrain import main

    sys.exit(main(argv))


class Run:
    """``tools/pretrain.py`` with these words, as one process or as several ranks, going on."""

    _outputs: tempfile.TemporaryDirectory | None = None  # of all runs of this process

    def __init__(self, *words, ranks=1, config="moco-v2", function=_command, **environment):
        port = free_port()
        argv = ["--config", config, *map(str, words)]
        Run._outputs = Run._outputs or tempfile.TemporaryDirectory(prefix="runs-")
        handle, name = tempfile.mkstemp(suffix=".txt", dir=Run._outputs.name)
        os.close(handle)
        self.output = Path(name)
        self.ranks = []
        for rank in range(ranks):
            settings = {name: str(value) for name, value in environment.items()}
            if ranks > 1:
                settings |= torchrun_environment(rank, ranks, port)
            self.ranks.append(Fork(function, argv, self.output, settings))

    @property
    def text(self):
        return self.output.read_text()

    def wait_for(self, words, seconds=60):
        """Until the run has said this."""
        self.wait_until(lambda: words in self.text, seconds)

    def wait_until(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert any(rank.exitcode is None for rank in self.ranks), self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.005)

    def signal(self, number, rank=None):
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def kill(self):
        """Kill -9 of all its processes, data-loader workers included."""
        for process in self.ranks:
            for kill in (os.killpg, os.kill):  # it may not have come to its own group yet
                with suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)
        return self.wait()

    def wait(self, seconds=120):
        """The exit codes of its ranks."""
        try:
            return [process.wait(seconds) for process in self.ranks]
        except AssertionError:
            raise AssertionError(self.text) from None


def run(*words, **kwargs):
    """A run to its end: exit code of rank 0, and what it said."""
    whole = Run(*words, **kwargs)
    codes = whole.wait()
    return codes[0], whole.text


def assert_equal_checkpoints(a, b):
    """Every bit that a run goes on from."""
    one, other = checkpoint.load(a), checkpoint.load(b)
    assert one["step"] == other["step"]
    _assert_equal(one["state_dict"], other["state_dict"], "state_dict")
    _assert_equal(one["optimizer"], other["optimizer"], "optimizer")
    _assert_equal(one["ranks"], other["ranks"], "ranks")


def _assert_equal(a, b, where):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            _assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            _assert_equal(*pair, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where

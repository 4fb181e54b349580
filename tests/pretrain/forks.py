"""Processes for the price of a fork.

A server imports torch and the package once, for as long as this process lives; every process that
is asked for is a fork of it, and otherwise like any other: it may be signalled and killed, has
exit handlers and an exit code.
"""

import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Fork:
    """``function(*args)`` in a process of its own; the function must be importable."""

    # Slow imports, some of which a run makes only where it first needs them.
    preloaded = (
        *("torch._dynamo", "torch.utils.tensorboard", "pretrain.engine.train_loop"),
        "tools.pretrain",
    )
    server = None  # with ``stdin`` and ``stdout``, started on the first request

    def __init__(self, function, *args):
        self.pid = self._ask(("start", pickle.dumps((function, args))))
        self._exitcode = None

    @classmethod
    def _ask(cls, request):
        if cls.server is None:
            cls.server = subprocess.Popen(
                [sys.executable, "-m", __name__, *cls.preloaded],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        pickle.dump(request, cls.server.stdin)
        cls.server.stdin.flush()
        return pickle.load(cls.server.stdout)

    @property
    def exitcode(self):
        """None while it runs; minus the signal that killed it."""
        if self._exitcode is None:
            self._exitcode = self._ask(("poll", self.pid))
        return self._exitcode

    def wait(self, seconds=120):
        end = time.monotonic() + seconds
        while self.exitcode is None:
            assert time.monotonic() < end, "still running"
            time.sleep(0.005)
        return self.exitcode


def wait_for_all(forks, seconds=240):
    """Until all have ended, which must be well; if one has not, the others are killed."""
    forks, end = list(forks), time.monotonic() + seconds
    while True:
        codes = [fork.exitcode for fork in forks]
        if any(codes) or time.monotonic() > end:
            for fork in forks:
                if fork.exitcode is None:
                    os.kill(fork.pid, signal.SIGKILL)
            raise AssertionError(f"exit codes of the processes: {codes}")
        if None not in codes:
            return
        time.sleep(0.005)


def serve(modules):
    """Serve until the other end is gone; in a fork, do what it is to do."""
    work = _serve(modules)
    if work is not None:
        do, arguments = pickle.loads(work)
        do(*arguments)


def _serve(modules):
    """Until the other end is gone; in a fork, what it is to do."""
    for module in modules:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    while True:
        try:
            command, value = pickle.load(requests)
        except EOFError:
            return None
        if command == "poll":
            pid, status = os.waitpid(value, os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        else:
            reply = os.fork()
            if reply == 0:
                replies.detach()
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, 0)
                os.dup2(nothing, 1)
                return value
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    serve(sys.argv[1:])

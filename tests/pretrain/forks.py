"""Processes for the price of a fork.

A server imports torch and the package once, for as long as this process lives; every process that
is asked for is a fork of it, and otherwise like any other: it may be signalled and killed, has
exit handlers and an exit code.
"""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Fork:
    """``function(*args)`` in a process of its own; the function must be importable."""

    _server: subprocess.Popen | None = None

    def __init__(self, function, *args):
        self.pid = self._ask(("start", pickle.dumps((function, args))))
        self._exitcode = None

    @classmethod
    def _ask(cls, request):
        if cls._server is None:
            cls._server = subprocess.Popen(
                [sys.executable, "-m", __name__],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        pickle.dump(request, cls._server.stdin)
        cls._server.stdin.flush()
        return pickle.load(cls._server.stdout)

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


def _serve():
    """Until the other end is gone; in a fork, what it is to do."""
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401 - slow imports, made where a run first needs them

    import pretrain.engine.train_loop  # noqa: F401
    import tools.pretrain  # noqa: F401

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
    work = _serve()
    if work is not None:
        do, arguments = pickle.loads(work)
        do(*arguments)

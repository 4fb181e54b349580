"""Run a function on gloo ranks and collect what each returns."""

import os
import random
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from moco_common.launch import launch
from tests.pretrain.forks import Fork, wait_for_all


def free_port():
    """A port below those that the kernel gives to any connection: one of these may be taken again
    before rank 0 listens on it."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def torchrun_environment(rank, processes, port):
    """What torchrun tells a rank of itself."""
    names = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": processes, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


def _store(function, args, file):
    torch.save(function(*args), file)


def _as_rank(environment, function, args, file):
    os.environ.update(environment)
    launch(_store, 1, function, args, file)


def on_ranks(processes, function, *args):
    """``[function(*args) of rank 0, of rank 1, ...]``; the function must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        files = [Path(folder) / f"{rank}.pt" for rank in range(processes)]
        wait_for_all(
            Fork(_as_rank, torchrun_environment(rank, processes, port), function, args, file)
            for rank, file in enumerate(files)
        )
        return [torch.load(file, weights_only=True) for file in files]

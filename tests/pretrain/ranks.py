"""Run a function on gloo ranks and collect what each returns."""

import os
import socket
import tempfile
from pathlib import Path

import torch

from moco_common.launch import launch
from tests.pretrain.forks import Fork


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        ranks = [
            Fork(_as_rank, torchrun_environment(rank, processes, port), function, args, file)
            for rank, file in enumerate(files)
        ]
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * processes, f"exit codes of the ranks: {codes}"
        return [torch.load(file, weights_only=True) for file in files]

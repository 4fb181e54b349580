"""Run a function on gloo ranks and collect what each returns.

The ranks are forked from a server that has imported the libraries once: importing them anew in
every rank would take most of a test's time. They meet in a file: a port that is free when it is
chosen may be taken by another process before a rank listens on it.
"""

import multiprocessing
import tempfile
from pathlib import Path

import torch

from tests.pretrain.forks import Fork, wait_for_all

PRELOADED = ("moco_det.engine.train_net", "tests.conftest")


class DetectionFork(Fork):
    preloaded = PRELOADED
    server = None


def preload():
    """Before a forkserver of multiprocessing starts: what it imports."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))


def on_ranks(processes, function, *args):
    """``[function(rank, *args) of rank 0, of rank 1, ...]``; the function must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        wait_for_all(
            DetectionFork(_as_rank, rank, processes, folder, function, args)
            for rank in range(processes)
        )
        files = [Path(folder, f"{rank}.pt") for rank in range(processes)]
        return [torch.load(file, weights_only=True) for file in files]


def _as_rank(rank, processes, folder, function, args):
    from detectron2.utils import comm

    torch.set_num_threads(1)
    where = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", where, rank=rank, world_size=processes)
    comm.create_local_process_group(processes)
    torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()

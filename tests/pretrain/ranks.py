"""Run a function on gloo ranks and collect what each returns."""

import os
import tempfile
from pathlib import Path

import torch

from pretrain import distributed
from pretrain.launch import launch


def _store(function, folder, args):
    result = function(*args)
    torch.save(result, Path(folder) / f"{distributed.rank()}.pt")


def on_ranks(processes, function, *args):
    """``[function(*args) of rank 0, of rank 1, ...]``; the function must be importable."""
    threads, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    try:
        with tempfile.TemporaryDirectory() as folder:
            launch(_store, processes, function, folder, args)
            return [
                torch.load(Path(folder) / f"{i}.pt", weights_only=True) for i in range(processes)
            ]
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads

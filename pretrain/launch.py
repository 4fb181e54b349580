"""The processes of a run: ranks on this machine, or the rank that ``torchrun`` made of this one.

The backend is chosen here and named nowhere else: NCCL where there are GPUs, else gloo.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.errors import UserError


def launch(function: Callable[..., Any], processes: int, *args: Any) -> None:
    """Run ``function(*args)`` on ``processes`` ranks of this machine, or as the rank that
    ``torchrun`` made this process.

    Args:
        processes: ranks to start: GPUs where there are GPUs, else gloo processes on the CPU.

    Raises:
        UserError: of a rank, or because a rank was killed.
        Exception: whatever else ``function`` raises; of several processes as
            ``mp.ProcessRaisedException``, which holds the traceback of the rank that failed.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _as_rank(None, None, None, function, args, None)
    elif processes > 1:
        # When one rank fails, the others fail for want of it, and spawn reports whichever it sees
        # first; a user's mistake reaches us here whoever comes first.
        mistakes = mp.get_context("spawn").SimpleQueue()
        try:
            mp.spawn(
                _as_rank, (processes, _free_port(), function, args, mistakes), nprocs=processes
            )
        except mp.ProcessRaisedException:
            if mistakes.empty():
                raise
            raise UserError(mistakes.get()) from None
        except mp.ProcessExitedException as error:
            raise UserError(
                f"A rank was lost ({error}): go on with --resume from the last checkpoint."
            ) from None
    else:
        function(*args)


def _as_rank(
    local_rank: int | None,
    processes: int | None,
    port: int | None,
    function: Any,
    args: Any,
    mistakes: Any,
) -> None:
    on_gpu = torch.cuda.is_available()
    if processes is None:
        dist.init_process_group("nccl" if on_gpu else "gloo")
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
    else:
        assert local_rank is not None
        # Every rank has its share of the cores; more threads than cores only fight.
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=local_rank,
            world_size=processes,
        )
    if on_gpu:
        torch.cuda.set_device(local_rank)
    try:
        function(*args)
    except UserError as error:
        if mistakes is not None:
            mistakes.put(str(error))
        raise
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Collectives over the ranks of a run. With one rank, each is the identity.

The same calls run on one process, on gloo processes on CPUs and on NCCL processes on GPUs. All
ranks must make each call, in the same order. `moco_common.launch` starts the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


_leave_gpus = False  # set by the launcher where a run asks for CPUs


def leave_gpus(value: bool) -> None:
    """Make `device` the CPU, whatever this machine has."""
    global _leave_gpus
    _leave_gpus = value


def device() -> torch.device:
    """Return the device of this rank: its own GPU where there are GPUs, else the CPU; with several
    ranks, the kind that their backend serves."""
    on_cpu = _leave_gpus or (dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO)
    if not on_cpu and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device without waiting for the device.

    A GPU copies in the background from pinned memory only; from other memory, the host first waits
    for everything that it has asked of the GPU so far.
    """
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def all_gather(x: Tensor) -> Tensor:
    """Concatenate equally shaped tensors of all ranks in rank order.

    Carries the gradient: each rank receives the sum, over all ranks, of the gradients with respect
    to its own rows. With gradients averaged over the ranks afterwards (as `wrap` does), that is the
    gradient of the mean of the ranks' losses.

    Shape: (n, ...) on each of W ranks -> (W*n, ...) on every rank.
    """
    return x if world_size() == 1 else _AllGather.apply(x)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every rank sends each other rank that one's rows; summed in rank order, so that the
        # result does not depend on the algorithm of a reduction.
        gradient = gradient.contiguous()
        received = torch.empty_like(gradient)
        dist.all_to_all_single(received, gradient)
        return torch.sum(received.unflatten(0, (world_size(), -1)), 0)


def maximum(value: int) -> int:
    """Return the largest of the ranks' values."""
    return value if world_size() == 1 else start_maximum(value)()


def start_maximum(value: int) -> Callable[[], int]:
    """Start computing the maximum over the ranks, and return a function that waits for the result.

    With a training step between the two calls, neither the ranks nor the GPUs wait.
    """
    x = torch.full((1,), value, device=device())  # no copy from the CPU, which would wait
    exchange = dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True)
    if x.device.type == "cpu":

        def read() -> int:
            exchange.wait()
            return int(x)

        return read
    exchange.wait()  # orders the stream, without holding up this thread
    host = torch.empty(1, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read_copy() -> int:
        arrived.synchronize()
        return int(host)

    return read_copy


def barrier() -> None:
    """Wait until all ranks have called this."""
    if world_size() > 1:
        here = device()  # without it, NCCL guesses a GPU by the rank's number
        dist.barrier(device_ids=[here.index] if here.type == "cuda" else None)

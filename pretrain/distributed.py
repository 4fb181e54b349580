"""Collective operations for methods; on a single rank, each is the identity.

The same calls work in one process, over gloo on CPUs and over NCCL on GPUs. All ranks must make
the same calls in the same order. `moco_common.launch` starts the ranks.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moco_common.comm import all_gather, device, rank, to_device, world_size


@torch.no_grad()
def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum over the ranks of equally shaped tensors, as a new tensor without gradient."""
    if world_size() == 1:
        return x.clone()
    total = x.contiguous().clone()
    dist.all_reduce(total)
    return total


def all_reduce_mean(tensors: list[Tensor]) -> None:
    """Replace each floating-point tensor by its mean over the ranks, in place."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def all_gather_text(text: str) -> list[str]:
    """Return the texts of all ranks, in rank order."""
    if world_size() == 1:
        return [text]
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device())
    lengths = all_gather(torch.tensor([len(mine)], device=device())).tolist()
    padded = mine.new_zeros(1, max(lengths))
    padded[0, : len(mine)] = mine
    rows = all_gather(padded).cpu()  # Wx(length of the longest)
    return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, lengths, strict=True)]


def permute_batch(x: Tensor, permutation: Tensor) -> Tensor:
    """Permute the rows of the global batch; each rank receives only the rows of its own slice.

    The global batch is the concatenation of the ranks' batches of n rows each, in rank order. Rank
    r receives the global rows ``permutation[r*n : (r+1)*n]``, in that order, by one all-to-all. On
    average, each rank receives (W-1)/W of a batch from the others. Applying the inverse,
    ``permutation.argsort()``, undoes the permutation, as the backward pass does for the gradient.

    Args:
        x: (n, ...), with the same shape and dtype on every rank; any dtype. uint8 is sent as uint8.
        permutation: (W*n,) int64 permutation of range(W*n) on the CPU, equal on every rank: the
            sizes of the exchange are computed from it without asking the device.

    Shape: (n, ...) -> (n, ...), contiguous in the memory format of ``x``.
    """
    if world_size() == 1:
        return x[to_device(permutation, x.device)]
    permuted: Tensor = _Permute.apply(x, permutation)
    return permuted


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Tensor) -> Tensor:
        ctx.permutation = permutation
        return _exchange(x, permutation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.permutation.argsort()), None


def _exchange(x: Tensor, permutation: Tensor) -> Tensor:
    n, me = len(x), rank()
    mine = permutation.view(world_size(), n)  # Wxn: the rows that each rank receives
    owners = mine // n  # Wxn: the rank that holds each row
    outgoing = [mine[to][owners[to] == me] - me * n for to in range(world_size())]
    order = owners[me].argsort(stable=True)  # my rows, by the rank that sends them
    received = owners[me].bincount(minlength=world_size()).tolist()
    # Rows are sent in their memory order, so that a channels-last batch is not transposed.
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    rows = x.permute(0, 2, 3, 1) if channels_last else x
    payload = rows[to_device(torch.cat(outgoing), x.device)].contiguous()
    buffer = torch.empty_like(payload)
    dist.all_to_all_single(buffer, payload, received, [len(part) for part in outgoing])
    result = torch.empty_like(buffer)
    result[to_device(order, x.device)] = buffer
    return result.permute(0, 3, 1, 2) if channels_last else result


def average_batch_norm(module: nn.Module) -> None:
    """Average the running BN statistics over the ranks, in place on every rank."""
    all_reduce_mean(
        [buffer for name, buffer in module.named_buffers() if name.endswith(_STATISTICS)]
    )


_STATISTICS = ("running_mean", "running_var")


def wrap(module: nn.Module) -> nn.Module:
    """Wrap a module so that its gradients are averaged over the ranks.

    Buffers are not broadcast: the queue is identical on all ranks, and BN statistics are each
    rank's own until they are saved.
    """
    if world_size() == 1:
        return module
    gpu = device()
    with warnings.catch_warnings():
        # torch 2.14 renames the argument; all supported releases accept the old name.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return nn.parallel.DistributedDataParallel(
            module, device_ids=[gpu] if gpu.type == "cuda" else None, broadcast_buffers=False
        )

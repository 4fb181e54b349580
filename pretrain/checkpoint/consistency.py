"""Checks of a state before it is saved: finite, and identical on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_common import comm
from moco_common.errors import UserError

_WIDTH = 1024
_ROW, _COLUMN = 0x1E3779B97F4A7C14, 0x2545F4914F6CDD1C  # even, with many bits set


def way_on(saved: int) -> str:
    """Return what to do after a failure, where ``saved`` is the step of the last checkpoint; 0 if
    there is none."""
    if not saved:
        return "start again (no checkpoint has been saved yet)"
    return f"use --resume to continue from the checkpoint of iteration {saved}"


def check_finite(state: Mapping[str, Any], step: int, saved: int = 0) -> None:
    """Check that all floating-point tensors of a state are finite.

    Raises:
        UserError: a tensor contains a NaN or an infinity; the message names it.
    """
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor) and x.numel()}
    floats = {name: x for name, x in tensors.items() if x.is_floating_point()}
    if not floats:
        return
    # The minimum and the maximum propagate NaN, at a twentieth of the cost of isfinite().
    here = comm.device()  # the tensors of a state may be on several devices
    extremes = torch.stack(
        [torch.stack(torch.aminmax(x)).float().to(here) for x in floats.values()]
    )
    for name, finite in zip(floats, extremes.isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise UserError(
                f"{name} is not finite after iteration {step}, and this state was not saved: "
                f"{way_on(saved)}, with a lower SOLVER.BASE_LR."
            )


def check_same_on_all_ranks(state: Mapping[str, Tensor], step: int, saved: int = 0) -> None:
    """Compare digests of all tensors across the ranks. All ranks must call this.

    Raises:
        UserError: on every rank, if any bit of a tensor differs from rank 0's; the message names
            the first such tensor.
    """
    if comm.world_size() == 1 or not state:
        return
    digests = torch.stack([digest(x) for x in state.values()])  # T
    rows = comm.all_gather(digests[None].to(comm.device())).cpu()  # WxT
    differs = rows != rows[0]
    if differs.any():
        tensor = int(differs.any(0).nonzero()[0])
        ranks = differs[:, tensor].nonzero().flatten().tolist()
        raise UserError(
            f"{list(state)[tensor]} differs between rank {', '.join(map(str, ranks))} and rank 0 "
            f"after iteration {step} ({int(differs.any(0).sum())} of {len(state)} tensors differ; "
            f"the cause is a machine, the network or the method), and this state was not saved: "
            f"{way_on(saved)}."
        )


def digest(x: Tensor) -> Tensor:
    """Hash the bits of a tensor and their positions, on its device.

    The hash is the sum modulo 2^64 of the tensor's 64-bit words, each multiplied by the sum of a
    row weight and a column weight. Integer arithmetic gives the same hash on every kind of device,
    and sums along rows and columns cost no more than reading the tensor. All weights are odd, so
    changing one word always changes the hash; changing several almost always does.

    Returns:
        int64 scalar.
    """
    flat = x.detach().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = len(flat) // (8 * _WIDTH)
    words = flat[: whole * 8 * _WIDTH].view(torch.int64).view(whole, _WIDTH)
    rest = F.pad(flat[whole * 8 * _WIDTH :], (0, -len(flat) % 8)).view(torch.int64)
    rows = torch.arange(whole + 1, device=x.device) * _ROW
    columns = torch.arange(_WIDTH, device=x.device) * _COLUMN + 1
    return (
        (words.sum(1) * rows[:-1]).sum()
        + (words.sum(0) * columns).sum()
        + (rest * (rows[-1] + columns[: len(rest)])).sum()
    )

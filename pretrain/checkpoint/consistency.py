"""What must be true of a state before it is saved: finite, and the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_common import comm
from moco_common.errors import UserError

_WAY_ON = "nothing of it was saved; go on with --resume from the last checkpoint"
_WIDTH = 1024
_ROW, _COLUMN = 0x1E3779B97F4A7C14, 0x2545F4914F6CDD1C  # even, of many bits


def check_finite(state: Mapping[str, Any], step: int) -> None:
    """
    Raises:
        UserError: a tensor holds a NaN or an infinity; it is named.
    """
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor) and x.numel()}
    floats = {name: x for name, x in tensors.items() if x.is_floating_point()}
    if not floats:
        return
    # Both propagate NaN, and cost a twentieth of what isfinite() and a norm do.
    here = comm.device()  # the parts of a state may lie on several
    extremes = torch.stack(
        [torch.stack(torch.aminmax(x)).float().to(here) for x in floats.values()]
    )
    for name, finite in zip(floats, extremes.isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise UserError(
                f"{name} is not finite after iteration {step}: {_WAY_ON} and a lower "
                f"SOLVER.BASE_LR."
            )


def check_same_on_all_ranks(state: Mapping[str, Tensor], step: int) -> None:
    """Compare digests of all tensors over the ranks; all ranks must call.

    Raises:
        UserError: on every rank, if a tensor differs, in any bit, from rank 0's; the first is
            named.
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
            f"{list(state)[tensor]} is another on rank {', '.join(map(str, ranks))} than on rank 0 "
            f"after iteration {step} ({int(differs.any(0).sum())} of {len(state)} tensors differ; "
            f"a fault of a machine, the network or the method): {_WAY_ON}."
        )


def digest(x: Tensor) -> Tensor:
    """A hash of the bits of a tensor and their places, on its device: int64, ().

    The sum of its 64-bit words, each times a weight that is the sum of one of its row's and one of
    its column's, modulo 2^64: integers, so that every kind of device gets the same, and sums along
    rows and columns, which cost no more than reading. All weights are odd, so one changed word
    always changes it; others do, but for unlikely coincidences.
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

"""Batch norm over several processes, and precise statistics before an evaluation.

How Detectron2's synchronised norms weight processes, and when the result equals the statistics of
the joined batch (tested on 2 and 4 processes):

=============== ========================== =================================================
norm            weight of a process        equals the joined batch
=============== ========================== =================================================
naiveSyncBN     the same for all           if all have the same N, H and W
naiveSyncBN_N   its N                      if all have the same H and W
SyncBN          its number of pixels       always; torch's own runs on GPUs only
=============== ========================== =================================================
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn

from moco_common.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm
from moco_common.text import counted

log = logging.getLogger(__name__)


def replace_sync_bn(model: nn.Module) -> int:
    """Replace torch's SyncBatchNorm, which runs on GPUs only, by this project's equivalent.

    Returns:
        The number of replaced layers.
    """
    replaced = synchronise_batch_norm(model, (nn.SyncBatchNorm,))
    if replaced:
        log.info("norms      SyncBN replaced by an equivalent that also runs on CPUs")
    return replaced


@contextmanager
def norms_apart(model: nn.Module) -> Iterator[None]:
    """Within ``with``, every process normalises by its own batch: no norm waits for the others.

    Parameters and buffers stay the same objects; norms that are not synchronised are not touched.
    """
    kinds = (NaiveSyncBatchNorm, nn.SyncBatchNorm, SyncBatchNorm)
    synchronised = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if isinstance(child, kinds)
    ]
    try:
        for parent, name, child in synchronised:
            alone = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
            alone._parameters, alone._buffers = child._parameters, child._buffers
            setattr(parent, name, alone.train(child.training))
        yield
    finally:
        for parent, name, child in synchronised:
            setattr(parent, name, child)


def norm_notes(model: nn.Module, *, per_pass: int, passes: int, world_size: int) -> list[str]:
    """Return notes on what the batch norms of a model normalise over; empty for the usual case.

    Args:
        model: model with the norms used in training.
        per_pass: images per process and forward pass.
        passes: forward passes per optimisation step.
        world_size: number of processes.
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    if not norms:
        return []
    naive = any(isinstance(norm, NaiveSyncBatchNorm) for norm in norms)
    synchronised = naive or any(
        isinstance(norm, (nn.SyncBatchNorm, SyncBatchNorm)) for norm in norms
    )
    seen = per_pass * (world_size if synchronised else 1)
    notes = []
    if naive and world_size > 1:
        notes.append(
            "naiveSyncBN gives every process the same weight, as in the published runs; if image "
            "sizes differ, only NORM SyncBN computes the statistics of the joined batch"
        )
    if passes > 1:
        notes.append(
            f"BN sees the {counted(seen, 'image')} of one pass: accumulation over {passes} passes "
            "sums gradients, not statistics"
        )
    if seen < 2:
        notes.append(
            "BN over a single image costs accuracy: use more images per pass, several processes "
            "with a synchronised norm, or the protocol's -GN sibling, whose group norm needs no "
            "batch (but does not accept weights pre-trained with BN)"
        )
    return notes


@torch.no_grad()
def update_statistics(model: nn.Module, passes: Iterable[Any]) -> int:
    """Set the running statistics of all BN layers to those of all their inputs together.

    These are the mean and variance of each layer's input at fixed weights (Wu and Johnson 2021,
    "Rethinking Batch in BatchNorm", section 3). Moments are pooled over all pixels of all passes
    of all processes, so the result depends neither on the batch size nor on the number of
    processes, and all processes obtain identical bits.

    Args:
        model: model whose BN layers in training mode are updated; they normalise by batch
            meanwhile.
        passes: this process's inputs of the model; all processes must have the same number.

    Returns:
        The number of updated layers.
    """
    norms = get_bn_modules(model)
    sums = {norm: _Moments(norm.num_features, norm.running_mean.device) for norm in norms}
    handles = [norm.register_forward_pre_hook(moments.add) for norm, moments in sums.items()]
    try:
        for inputs in passes:
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not norms:
        return 0
    joined = torch.cat([moments.sums for moments in sums.values()])
    if comm.get_world_size() > 1:
        dist.all_reduce(joined)
    for norm, pooled in zip(norms, joined.split([len(m.sums) for m in sums.values()]), strict=True):
        count, first, second = pooled.split([1, norm.num_features, norm.num_features])
        if count:  # zero for an unused layer
            mean = first / count
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((second / count - mean**2).clamp(min=0))
    return len(norms)


class _Moments:
    """Count, sum and sum of squares of a layer's inputs, in float64 because the variance is a
    difference of large sums."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.sums = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=device)

    def add(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        count = x.numel() // x.shape[1]
        if count:
            dims = [d for d in range(x.ndim) if d != 1]
            var, mean = (v.double() for v in torch.var_mean(x.float(), dim=dims, correction=0))
            self.sums += torch.cat([mean.new_ones(1), mean, var + mean**2]) * count

"""Batch norm over several processes, and true statistics before an evaluation.

What Detectron2's synchronised norms compute, for images of unequal sizes (shown by test, on 2 and
4 processes):

=============== ========================== =================================================
norm            weight of a process        the joined batch's statistics
=============== ========================== =================================================
naiveSyncBN     the same for all           only where all have the same N, H and W
naiveSyncBN_N   its N                      only where all have the same H and W
SyncBN          its number of pixels       always; torch's own runs on GPUs only
=============== ========================== =================================================
"""

import logging
from collections.abc import Iterable
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
    """Replace torch's SyncBatchNorm, which runs on GPUs only, by this project's.

    Returns:
        The number of replaced layers.
    """
    replaced = synchronise_batch_norm(model, (nn.SyncBatchNorm,))
    if replaced:
        log.info("norms      SyncBN by this project's own, torch's runs on GPUs only: the same")
    return replaced


def say_norms(model: nn.Module, *, per_pass: int, passes: int, world_size: int) -> list[str]:
    """Return what the batch norms of a model normalise over, and what a user should know of it.

    Args:
        model: with the norms that it will be trained with.
        per_pass: images that one process sees in one forward pass.
        passes: forward passes of one optimisation step.
        world_size: number of processes.
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    if not norms:
        return []
    alike = any(isinstance(norm, NaiveSyncBatchNorm) for norm in norms)
    synchronised = alike or any(
        isinstance(norm, (nn.SyncBatchNorm, SyncBatchNorm)) for norm in norms
    )
    seen = per_pass * (world_size if synchronised else 1)
    said = []
    if alike and world_size > 1:
        said.append(
            "naiveSyncBN gives every process the same weight, as in the published runs: where "
            "image sizes differ that is not the joined batch (NORM SyncBN is)"
        )
    if passes > 1:
        said.append(
            f"BN sees the {counted(seen, 'image')} of one pass: accumulating {passes} of them adds "
            "up gradients, not statistics"
        )
    if seen < 2:
        said.append(
            "BN that sees one image costs accuracy: fit more images into a pass, use several "
            "processes with a synchronised norm, or take the protocol's -GN sibling, whose group "
            "norm needs no batch (weights that were pre-trained with BN do not fit it)"
        )
    return said


@torch.no_grad()
def update_statistics(model: nn.Module, passes: Iterable[Any]) -> int:
    """Set the running statistics of all BN layers to those of all their inputs together.

    The true mean and variance of what every layer sees while the weights stand still (Wu and
    Johnson 2021, "Rethinking Batch in BatchNorm", section 3): moments are pooled over all pixels
    of all passes of all processes, so that neither the size of a batch nor the process that saw it
    matters, and all processes end with the same bits.

    Args:
        model: its BN layers in training mode are updated; they normalise by batch, as in training.
        passes: inputs of the model, this process's share; all processes have equally many.

    Returns:
        The number of layers.
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
        if count:  # else the layer was not used
            mean = first / count
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((second / count - mean**2).clamp(min=0))
    return len(norms)


class _Moments:
    """Count, sum and sum of squares of a layer's inputs. In float64, so that E[x^2] - E[x]^2 and
    hundreds of batches lose nothing."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.sums = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=device)

    def add(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        count = x.numel() // x.shape[1]
        if count:
            dims = [d for d in range(x.ndim) if d != 1]
            var, mean = (v.double() for v in torch.var_mean(x.float(), dim=dims, correction=0))
            self.sums += torch.cat([mean.new_ones(1), mean, var + mean**2]) * count

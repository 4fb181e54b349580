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
from fvcore.nn.distributed import differentiable_all_gather
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn

from moco_common.text import counted

log = logging.getLogger(__name__)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the joined batch of all processes, on any device.

    Equal to :class:`torch.nn.BatchNorm2d` of one process on all their pixels: values, gradients
    and running statistics, whatever the number and the size of the images of each. A process
    without any image takes part. Input: (N, C, H, W), N >= 0.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or comm.get_world_size() == 1:
            return super().forward(input)
        x = input.float()  # half precision is too coarse for the reduction
        count = x.numel() // x.shape[1]
        if count:
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)  # C, C
        else:
            var = mean = x.sum(dim=(0, 2, 3))  # zeros, with a path for the gradient
        # One row a process. Pooled by Chan et al. 1979 ("Updating formulae ..."): no difference of
        # large numbers, as in E[x^2] - E[x]^2.
        rows = torch.stack(
            differentiable_all_gather(torch.cat([mean, var, mean.new_tensor([count])]))
        )
        means, variances, counts = rows.split([len(mean), len(mean), 1], dim=1)  # WxC, WxC, Wx1
        total = counts.sum()
        share = counts / total.clamp(min=1)
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean) ** 2)).sum(0)
        self._track(mean.detach(), var.detach(), total)
        scale = torch.rsqrt(var + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        y: Tensor = x * scale[:, None, None] + shift[:, None, None]
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, total: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or not total:
            return
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            if momentum is None:  # a cumulative average
                momentum = 1 / int(self.num_batches_tracked)
        assert momentum is not None
        unbiased = var * total / (total - 1).clamp(min=1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def replace_sync_bn(model: nn.Module) -> int:
    """Put :class:`SyncBatchNorm2d` in the place of torch's SyncBatchNorm, which refuses CPUs.

    Parameters and buffers stay the same objects; names stay as they are.

    Returns:
        How many there were.
    """
    found = 0
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.SyncBatchNorm):
                ours = SyncBatchNorm2d(
                    child.num_features, child.eps, child.momentum, child.affine
                ).train(child.training)
                ours.weight, ours.bias = child.weight, child.bias
                for buffer, value in child.named_buffers(recurse=False):
                    setattr(ours, buffer, value)
                setattr(parent, name, ours)
                found += 1
    if found:
        log.info("norms      SyncBN by this project's own, torch's runs on GPUs only: the same")
    return found


def say_norms(model: nn.Module, *, per_pass: int, passes: int, world_size: int) -> list[str]:
    """What the batch norms of a model normalise over, and what is to be known about it.

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
        isinstance(norm, (nn.SyncBatchNorm, SyncBatchNorm2d)) for norm in norms
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

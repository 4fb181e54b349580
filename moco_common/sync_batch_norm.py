"""Batch normalisation over the batches of all ranks, on any device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moco_common import comm


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the joined batch of all ranks, with gradient.

    ("Global BN", Chen et al. 2020, SimCLR, Section 2.2.) Values, gradients and running statistics
    equal those of one process on all rows or pixels, whatever the number and size of each rank's
    images; a rank may have none. The ranks exchange mean, variance and count, 2 C + 1 numbers, in
    one all-gather. On one process, and in evaluation mode, this is plain batch normalisation.
    Unlike ``torch.nn.SyncBatchNorm`` it runs on CPUs too. State-dict names and shapes are those of
    ``nn.BatchNorm2d``.

    Shape: (N, C) or (N, C, H, W), N >= 0 -> the same.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected 2D or 4D input, got {input.dim()}D")

    def forward(self, input: Tensor) -> Tensor:
        world = comm.world_size()
        if not self.training or world == 1:
            return super().forward(input)
        self._check_input_dim(input)
        dims = [d for d in range(input.dim()) if d != 1]
        x = input.float() if input.dtype.itemsize < 4 else input  # half is too coarse for sums
        count = x.numel() // x.shape[1]
        if count:
            var, mean = torch.var_mean(x, dims, correction=0)  # C, C
        else:
            var = mean = x.sum(dims)  # zeros, with a path for the gradient
        # One row a rank, pooled by Chan et al. 1979 ("Updating formulae ..."): no difference of
        # large numbers, as in E[x^2] - E[x]^2.
        row = torch.cat([mean, var, mean.new_full((1,), count)])
        rows = comm.all_gather(row[None])  # Wx(2C+1)
        means, variances, counts = rows.split([len(mean), len(mean), 1], dim=1)  # WxC, WxC, Wx1
        total = counts.sum()
        share = counts / total.clamp(min=1)
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        self._track(mean.detach(), var.detach(), total)
        scale = (var + self.eps).rsqrt()  # C
        shift = -mean * scale  # C
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        shape = [1, -1] + [1] * (input.dim() - 2)
        return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, total: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # a cumulative average
                momentum = 1 / int(self.num_batches_tracked)
        assert momentum is not None
        # Without a single row on any rank nothing is learned; a tensor, so that no GPU is awaited.
        weight = momentum * (total > 0)
        unbiased = var * total / (total - 1).clamp(min=1)
        for buffer, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            buffer.lerp_(value.to(buffer.dtype), weight.to(buffer.dtype))


def synchronise_batch_norm(
    module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d)
) -> int:
    """Replace the normalisation layers of these kinds inside ``module``, in place, by
    `SyncBatchNorm`; parameters and buffers stay the same objects under the same names.

    Returns:
        The number of replaced layers.
    """
    replaced = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds):
                assert isinstance(child, nn.modules.batchnorm._BatchNorm)
                new = SyncBatchNorm(
                    child.num_features,
                    child.eps,
                    child.momentum,
                    child.affine,
                    child.track_running_stats,
                ).train(child.training)
                for key, parameter in child.named_parameters(recurse=False):
                    setattr(new, key, parameter)
                for key, buffer in child.named_buffers(recurse=False):
                    setattr(new, key, buffer)
                setattr(parent, name, new)
                replaced += 1
    return replaced

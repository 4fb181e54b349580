"""Batch normalisation over the batches of all ranks, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_common import comm


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics are those of the global batch, with gradient.

    ("Global BN", Chen et al. 2020, SimCLR, Section 2.2.) The ranks exchange mean and variance of
    their equal shares, 2 C numbers, in one all-gather; on one process, and in evaluation mode, this
    is plain batch normalisation. Unlike ``torch.nn.SyncBatchNorm`` it runs on CPUs too, and takes
    vectors as well as images. State-dict names and shapes are those of ``nn.BatchNorm2d``.

    Shape: (N, C) or (N, C, H, W), N > 0 and equal on all ranks -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        world = comm.world_size()
        if self.training:
            self.num_batches_tracked.add_(1)
        if not self.training or world == 1:
            return F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
        dims = [d for d in range(x.dim()) if d != 1]
        own = torch.var_mean(x.float() if x.dtype.itemsize < 4 else x, dims, unbiased=False)
        variances, means = comm.all_gather(torch.stack(own)[None]).unbind(1)  # WxC each
        mean = means.mean(0)  # C
        variance = (variances + (means - mean).square()).mean(0)  # C; by parts, nothing cancels
        with torch.no_grad():
            count = world * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()  # C
        shift = self.bias - mean * scale  # C
        shape = [1, -1] + [1] * (x.dim() - 2)
        return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)


def synchronise_batch_norm(module: nn.Module) -> None:
    """Replace every batch normalisation inside ``module``, in place, by one over all ranks."""
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            new = SyncBatchNorm(child.num_features, child.eps, child.momentum).to(child.weight)
            new.load_state_dict(child.state_dict())
            new.requires_grad_(child.weight.requires_grad)  # a target network's stays untrained
            setattr(module, name, new)
        else:
            synchronise_batch_norm(child)

"""Split batch normalisation: the per-GPU BN statistics of several GPUs in one process."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over ``groups`` equal slices of the batch, as if each were on a GPU.

    In training mode, slice g of the batch, rows [g*N/G, (g+1)*N/G), is normalised by its own mean
    and variance, exactly as by an unsynchronised ``nn.BatchNorm2d`` on G ranks. The running
    statistics are updated with the *mean over the groups* of their statistics. In evaluation mode,
    this is plain batch normalisation. State-dict names and shapes are those of ``nn.BatchNorm2d``.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        ValueError: in training mode, if N is not a multiple of ``groups``.
    """

    def __init__(self, num_features: int, groups: int = 1) -> None:
        super().__init__(num_features)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.groups == 1:
            return super().forward(x)
        if len(x) % self.groups:
            raise ValueError(f"a batch of {len(x)} cannot be split into {self.groups} equal groups")
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        means = self.running_mean.repeat(self.groups, 1)  # GxC
        variances = self.running_var.repeat(self.groups, 1)  # GxC
        normalized = [
            F.batch_norm(
                part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps
            )
            for part, mean, variance in zip(
                x.chunk(self.groups), means.unbind(), variances.unbind(), strict=True
            )
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
            self.num_batches_tracked.add_(1)
        return torch.cat(normalized)  # NxCxHxW


class SplitBatchNorm1d(SplitBatchNorm2d):
    """`SplitBatchNorm2d` for vectors.

    Shape: (N, C) -> (N, C).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None, None]).flatten(1)


def bn_groups_per_rank(total: int, batch_per_rank: int, world_size: int, smallest: int = 4) -> int:
    """Return the number of BN groups per rank for ``total`` groups over all ranks.

    It is the largest divisor of the rank's batch that is at most ``total / world_size`` and leaves
    at least ``smallest`` images per group; at least 1.
    """
    most = max(1, min(total // world_size, batch_per_rank // smallest))
    return max(groups for groups in range(1, most + 1) if batch_per_rank % groups == 0)

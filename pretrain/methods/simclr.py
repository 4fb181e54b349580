"""SimCLR (Chen et al. 2020, "A Simple Framework for Contrastive Learning"), as its Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from moco_common import comm
from pretrain.losses import nt_xent
from pretrain.methods.base import Method, Run
from pretrain.methods.components import (
    embedding_spread,
    encode_together,
    encoder_builder,
    positive_temperature,
    unit,
)
from pretrain.modeling.batch_norm import SplitBatchNorm1d
from pretrain.modeling.heads import mlp_head
from pretrain.modeling.resnet import ResNet


def build_simclr(cfg: CfgNode, run: Run) -> SimCLR:
    """SimCLR, as the keys of ``SIMCLR`` say."""
    head = mlp_head(
        cfg.SIMCLR.DIM, batch_norm=lambda channels: SplitBatchNorm1d(channels, run.bn_groups)
    )
    return SimCLR(
        encoder_builder(cfg, run, head)(),
        batch_size=cfg.SOLVER.BATCH_SIZE,
        temperature=cfg.SIMCLR.TEMPERATURE,
        bn_groups=run.bn_groups,
    )


class SimCLR(Method):
    """One encoder; two views of each image attract, all other pairs of the global batch repel.

    Args:
        encoder: f and g of the paper, the projection head as its ``fc``; its output is (N, C).
        batch_size: B, over all ranks.
        temperature: tau of NT-Xent.
        bn_groups: of the encoder; both views of a group's images share BN statistics.
    """

    num_views = 2

    def __init__(
        self, encoder: ResNet, *, batch_size: int, temperature: float = 0.1, bn_groups: int = 1
    ) -> None:
        super().__init__()
        self.temperature = positive_temperature("SIMCLR.TEMPERATURE", temperature)
        self.batch_size, self.bn_groups = batch_size, bn_groups
        self.encoder_q = encoder

    @property
    def chance_loss(self) -> float:
        """log(2B-1): one of all other embeddings is the right one."""
        return math.log(2 * self.batch_size - 1)

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Both views, each a batch; ``step`` and ``index`` are not used."""
        z = unit(torch.cat(encode_together(self.encoder_q, views, self.bn_groups)))  # 2NxC
        everyone = comm.all_gather(z)  # 2BxC, with gradient
        loss, correct = nt_xent(z, everyone, comm.rank() * len(z), self.temperature)
        return {
            "loss": loss,
            "accuracy": correct.float().mean(),
            "spread": embedding_spread(z.detach()),
        }

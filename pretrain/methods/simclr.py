"""SimCLR (Chen et al. 2020, "A Simple Framework for Contrastive Learning"), in the order of its
Algorithm 1: two views of an image attract each other, and all other pairs of the batch repel."""

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

KEYS = {
    "SIMCLR.DIM": (128, "Length of an embedding."),
    "SIMCLR.TEMPERATURE": (
        0.1,
        "Temperature of the loss, tau, by which similarities are divided. A lower value gives a "
        "sharper distribution.",
    ),
}


class SimCLR(Method):
    """One encoder; two views of an image attract each other, all other pairs repel.

    Args:
        encoder: f and g of the paper, with the projection head as its ``fc``; its output is (N, C).
        batch_size: B, over all ranks.
        temperature: tau of NT-Xent.
        bn_groups: of the encoder; both views of a group's images share BN statistics.
    """

    view_names = ("view 1", "view 2")

    def __init__(
        self, encoder: ResNet, *, batch_size: int, temperature: float = 0.1, bn_groups: int = 1
    ) -> None:
        super().__init__()
        self.temperature = positive_temperature("SIMCLR.TEMPERATURE", temperature)
        self.batch_size, self.bn_groups = batch_size, bn_groups
        self.encoder_q = encoder

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> SimCLR:
        """Build SimCLR from ``SIMCLR``."""
        head = mlp_head(
            cfg.SIMCLR.DIM, batch_norm=lambda channels: SplitBatchNorm1d(channels, run.bn_groups)
        )
        return cls(
            encoder_builder(cfg, run, head)(),
            batch_size=cfg.SOLVER.BATCH_SIZE,
            temperature=cfg.SIMCLR.TEMPERATURE,
            bn_groups=run.bn_groups,
        )

    @property
    def chance_loss(self) -> float:
        """log(2B-1): all other embeddings look alike."""
        return math.log(2 * self.batch_size - 1)

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Compare both views of the batch; ``step`` and ``index`` are not used."""
        z = unit(torch.cat(encode_together(self.encoder_q, views, self.bn_groups)))  # 2NxC
        everyone = comm.all_gather(z)  # 2BxC, with gradient
        loss, correct = nt_xent(z, everyone, comm.rank() * len(z), self.temperature)
        return {
            "loss": loss,
            "accuracy": correct.float().mean(),
            "spread": embedding_spread(z.detach()),
        }

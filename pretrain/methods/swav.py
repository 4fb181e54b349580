"""SwAV (Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments"), in the order of its Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from moco_common import comm
from moco_common.errors import UserError
from pretrain import distributed
from pretrain.losses import sinkhorn, swapped_prediction
from pretrain.methods.base import REMEDIES, Method, Run
from pretrain.methods.components import (
    embedding_spread,
    encode_together,
    encoder_builder,
    positive_temperature,
    unit,
)
from pretrain.modeling.heads import mlp
from pretrain.modeling.resnet import ResNet

CODED = 2  # the first views, the large ones, receive codes; small ones only predict (Section 3.3)


def build_swav(cfg: CfgNode, run: Run) -> SwAV:
    """SwAV, as the keys of ``SWAV`` say."""
    hidden, dim = cfg.SWAV.HIDDEN, cfg.SWAV.DIM
    head = lambda features: mlp(features, hidden, dim, run.bn_groups)  # noqa: E731
    return SwAV(
        encoder_builder(cfg, run, head)(),
        dim=dim,
        prototypes=cfg.SWAV.PROTOTYPES,
        temperature=cfg.SWAV.TEMPERATURE,
        epsilon=cfg.SWAV.EPSILON,
        iterations=cfg.SWAV.SINKHORN_ITERS,
        freeze_steps=cfg.SWAV.FREEZE_ITERS,
        queue_size=cfg.SWAV.QUEUE_SIZE,
        queue_start=cfg.SWAV.QUEUE_START_ITER,
        bn_groups=run.bn_groups,
    )


class SwAV(Method):
    """One encoder and prototypes; each view predicts the code of the others.

    Args:
        encoder: with the projection head as its ``fc``; its output is (N, dim).
        dim: C, length of an embedding.
        prototypes: P, number of cluster centres, trained by gradient and kept at length 1.
        temperature: tau of the prediction's softmax.
        epsilon, iterations: of the Sinkhorn-Knopp algorithm, which runs over all ranks.
        freeze_steps: steps at the start of which the prototypes do not move.
        queue_size: L, embeddings of past batches, over all ranks, that join the batch when codes
            are computed: for batches much smaller than P. 0 for none.
        queue_start: step from which on the queue is used (and full, at the earliest).
        bn_groups: of the encoder; views of a group's images of one size share BN statistics.
    """

    queue: Tensor

    def __init__(
        self,
        encoder: ResNet,
        *,
        dim: int = 128,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        freeze_steps: int = 313,
        queue_size: int = 0,
        queue_start: int = 0,
        bn_groups: int = 1,
    ) -> None:
        super().__init__()
        if epsilon < 0.025:
            raise UserError(f"SWAV.EPSILON is {epsilon}: it must be at least 0.025.")
        if min(prototypes, iterations) < 1 or queue_size < 0:
            raise UserError(
                f"SWAV.PROTOTYPES, SINKHORN_ITERS and QUEUE_SIZE are {prototypes}, {iterations} "
                f"and {queue_size}: they must be at least 1, 1 and 0."
            )
        self.temperature = positive_temperature("SWAV.TEMPERATURE", temperature)
        self.epsilon, self.iterations, self.freeze_steps = epsilon, iterations, freeze_steps
        self.queue_start, self.bn_groups = queue_start, bn_groups
        self.encoder_q = encoder
        self.prototypes = nn.Linear(dim, prototypes, bias=False)  # weight: PxC
        self.register_buffer("queue", torch.zeros(CODED, queue_size, dim))  # 2xLxC, newest first

    remedies = REMEDIES | {
        "collapse": "Lower SWAV.EPSILON or SOLVER.BASE_LR, or give the codes more to be balanced "
        "over: SWAV.QUEUE_SIZE, a larger batch, fewer SWAV.PROTOTYPES.",
    }

    @property
    def chance_loss(self) -> float:
        """log(P): all prototypes alike."""
        return math.log(len(self.prototypes.weight))

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Two large views, then any number of small ones; ``index`` is not used.

        Returns:
            beside the usual, ``accuracy``: the share of images whose first view is nearest to the
            prototype that the second one's code names.
        """
        with torch.no_grad():
            self.prototypes.weight.copy_(unit(self.prototypes.weight))
        z = self.encode(views)  # VxNxC
        scores = self.prototypes(z)  # VxNxP
        codes = self.codes(z[:CODED].detach(), scores[:CODED].detach(), step)  # 2xNxP
        loss = swapped_prediction(scores, codes, self.temperature)
        agree = scores[0].argmax(1) == codes[1].argmax(1)  # N
        return {
            "loss": loss,
            "accuracy": agree.float().mean(),
            "spread": embedding_spread(z[0].detach()),
        }

    def encode(self, views: Sequence[Tensor]) -> Tensor:
        """Embeddings of all views, (V, N, C), in one pass of the encoder for each resolution."""
        passes = [list(same) for _, same in groupby(views, key=lambda view: view.shape[2:])]
        z = [encode_together(self.encoder_q, same, self.bn_groups) for same in passes]
        return torch.stack([unit(embedding) for same in z for embedding in same])

    @torch.no_grad()
    def codes(self, z: Tensor, scores: Tensor, step: int) -> Tensor:
        """Codes of the large views, (2, N, P), over all ranks' batches and the queue."""
        n, world, size = z.shape[1], comm.world_size(), self.queue.shape[1]
        if size and step >= self.queue_start and step * n * world >= size:
            past = self.queue[:, comm.rank() :: world]  # each of it counts on one rank
            scores = torch.cat([scores, self.prototypes(past)], 1)  # 2x(N+L/W)xP
        codes = sinkhorn(scores, self.epsilon, self.iterations, distributed.all_reduce_sum)
        if size:
            newest = comm.all_gather(z.transpose(0, 1)).transpose(0, 1)  # 2xBxC
            self.queue.copy_(torch.cat([newest, self.queue], 1)[:, :size])
        return codes[:, :n]

    def before_update(self, step: int) -> None:
        """Prototypes stay where they are at first: it helps the start (Appendix A)."""
        if step < self.freeze_steps:
            self.prototypes.weight.grad = None

"""SwAV (Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments"), in the order of its Algorithm 1: each view predicts the cluster assignment of the
others, and the assignments are balanced over trained prototypes."""

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
from pretrain.methods.base import REMEDIES, Memory, Method, Run
from pretrain.methods.components import (
    embedding_spread,
    encode_together,
    encoder_builder,
    positive_temperature,
    unit,
)
from pretrain.modeling.heads import mlp
from pretrain.modeling.resnet import ResNet

KEYS = {
    "SWAV.HIDDEN": (2048, "Hidden units of the projector."),
    "SWAV.DIM": (128, "Length of an embedding."),
    "SWAV.PROTOTYPES": (3000, "Number of clusters. Small data sets need fewer."),
    "SWAV.TEMPERATURE": (
        0.1,
        "Temperature of the prediction, tau, by which similarities are divided. A lower value "
        "gives a sharper distribution.",
    ),
    "SWAV.EPSILON": (0.05, "Smoothness of the codes, at least 0.025."),
    "SWAV.SINKHORN_ITERS": (3, "Iterations of the Sinkhorn-Knopp algorithm."),
    "SWAV.FREEZE_ITERS": (313, "Iterations at the start during which prototypes are frozen."),
    "SWAV.QUEUE_SIZE": (0, "Embeddings of past batches that are used to compute codes."),
    "SWAV.QUEUE_START_ITER": (0, "First iteration at which the queue is used."),
}
CODED = 2  # the first views, the large ones, receive codes; small ones only predict (Section 3.3)


class SwAV(Method):
    """One encoder and prototypes; each view predicts the code of the others.

    Args:
        encoder: with the projection head as its ``fc``; its output is (N, dim).
        dim: C, length of an embedding.
        prototypes: P, number of cluster centres, trained by gradient and kept at length 1.
        temperature: tau of the prediction's softmax.
        epsilon, iterations: of the Sinkhorn-Knopp algorithm, which runs over all ranks.
        freeze_steps: steps at the start during which the prototypes are frozen.
        queue_size: L, embeddings of past batches, over all ranks, that are added to the batch when
            codes are computed, for batches much smaller than P; 0 for none.
        queue_start: first step at which the queue is used, but never before it is full.
        bn_groups: of the encoder; views of one size of a group's images share BN statistics.
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
        "collapse": "Lower SWAV.EPSILON or SOLVER.BASE_LR, or balance the codes over more samples "
        "(a larger SWAV.QUEUE_SIZE or batch) or fewer SWAV.PROTOTYPES.",
    }

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> SwAV:
        """Build SwAV from ``SWAV``."""
        hidden, dim = cfg.SWAV.HIDDEN, cfg.SWAV.DIM
        head = lambda features: mlp(features, hidden, dim, run.bn_groups)  # noqa: E731
        return cls(
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

    @property
    def chance_loss(self) -> float:
        """log(P): all prototypes look alike."""
        return math.log(len(self.prototypes.weight))

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Predict codes between two large views and any number of small ones after them.

        Returns:
            ``loss``, ``spread`` and ``accuracy``: the fraction of images whose first view is
            nearest to the prototype with the largest share in the code of the second.
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
        """Compute the embeddings of all views, (V, N, C), in one pass per resolution."""
        passes = [list(same) for _, same in groupby(views, key=lambda view: view.shape[2:])]
        z = [encode_together(self.encoder_q, same, self.bn_groups) for same in passes]
        return torch.stack([unit(embedding) for same in z for embedding in same])

    @torch.no_grad()
    def codes(self, z: Tensor, scores: Tensor, step: int) -> Tensor:
        """Compute the codes of the large views, (2, N, P), over all ranks and the queue."""
        n, world, size = z.shape[1], comm.world_size(), self.queue.shape[1]
        if size and step >= self.queue_start and step * n * world >= size:
            past = self.queue[:, comm.rank() :: world]  # each entry is counted on one rank
            scores = torch.cat([scores, self.prototypes(past)], 1)  # 2x(N+L/W)xP
        codes = sinkhorn(scores, self.epsilon, self.iterations, distributed.all_reduce_sum)
        if size:
            newest = comm.all_gather(z.transpose(0, 1)).transpose(0, 1)  # 2xBxC
            self.queue.copy_(torch.cat([newest, self.queue], 1)[:, :size])
        return codes[:, :n]

    def before_update(self, step: int) -> None:
        """Freeze the prototypes during the first steps (Appendix A)."""
        if step < self.freeze_steps:
            self.prototypes.weight.grad = None

    def memory(self, step: int, batch_size: int) -> Memory | None:
        """The queue, whose unwritten entries are zero; None if there is no queue."""
        size = self.queue.shape[1]
        if not size:
            return None
        written = self.queue[:, self.queue[0].norm(dim=1) > 0]  # 2xNxC
        vectors = written.flatten(0, 1)
        return Memory("queue of embeddings", size, written.shape[1], vectors)

    def cluster_centres(self) -> Tensor:
        """The prototypes."""
        return self.prototypes.weight

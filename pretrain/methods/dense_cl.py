"""DenseCL (Wang et al. 2021, "Dense Contrastive Learning for Self-Supervised Visual Pre-Training"):
MoCo with a second, dense contrast, in which each cell of the query's feature map is matched with
the cell of the key's map whose features are most similar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from moco_common import comm
from moco_common.errors import UserError
from pretrain.losses import info_nce
from pretrain.methods.base import Run
from pretrain.methods.components import (
    cells,
    contrastive_head,
    embedding_spread,
    encode_shuffled,
    encoder_builder,
    shared_generator,
    unit,
)
from pretrain.methods.correspondence import most_similar
from pretrain.methods.moco import MoCo, noise
from pretrain.modeling.batch_norm import SplitBatchNorm2d
from pretrain.modeling.heads import InstanceAndDense, mlp_head, per_cell
from pretrain.modeling.resnet import ResNet
from pretrain.profiling import stage

SHARED = ("MOCO",)
KEYS = {
    "DENSECL.WEIGHT": (
        0.5,
        "Weight of the dense loss, lambda. That of MoCo's own loss is 1 - lambda.",
    ),
}


class DenseCL(MoCo):
    """MoCo, and beside it a dense head and a queue of dense keys.

    Args:
        build_encoder: makes the encoder, with `InstanceAndDense` as its head.
        dim, queue_size, momentum, temperature, shuffle, seed: as of `MoCo`, for either contrast.
        weight: lambda of the paper, Eq. 3.
    """

    dense_queue: Tensor

    def __init__(
        self,
        build_encoder: Callable[[], ResNet],
        *,
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        shuffle: bool = True,
        seed: int = 0,
        weight: float = 0.5,
    ) -> None:
        super().__init__(
            build_encoder,
            dim=dim,
            queue_size=queue_size,
            momentum=momentum,
            temperature=temperature,
            shuffle=shuffle,
            seed=seed,
        )
        if not 0.0 <= weight <= 1.0:
            raise UserError(f"DENSECL.WEIGHT is {weight}: it must lie in [0, 1].")
        self.weight = weight
        self.register_buffer("dense_queue", noise(queue_size, dim, seed + 1))  # KxC

    def match(self, views: Sequence[Tensor]) -> Tensor:
        """By the backbones' features, as in training."""
        _, _, map_q = self.encoder_q(views[0])
        _, _, map_k = self.encoder_k(views[1])
        return most_similar(map_q.flatten(2), map_k.flatten(2)).view(-1, *map_q.shape[2:])

    def project(self, features: Tensor) -> Tensor:
        """The instance head's embeddings."""
        embeddings: Tensor = self.encoder_q.get_submodule("fc.instance")(features)
        return embeddings

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> DenseCL:
        """Build DenseCL from ``DENSECL`` and ``MOCO``. The dense head is always an MLP."""
        instance = contrastive_head(cfg, run)
        norm = partial(SplitBatchNorm2d, groups=run.bn_groups) if cfg.MOCO.MLP_BN else None
        dense = mlp_head(cfg.MOCO.DIM, batch_norm=norm, linear=per_cell)
        head = lambda features: InstanceAndDense(instance(features), dense(features))  # noqa: E731
        build = encoder_builder(cfg, run, head)
        return cls(build, weight=cfg.DENSECL.WEIGHT, **cls.settings(cfg))

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Contrast images and cells of their maps.

        Returns:
            as `MoCo.forward`, and ``dense_accuracy``: the fraction of cells that are nearer to
            their matched key than to all negatives.
        """
        with stage("encoders: forward q"):
            q, dense_q, map_q = self.encoder_q(views[0])  # NxC, NxCxhxw, NxFxhxw
        permutations = shared_generator(self.seed, step) if self.shuffle else None
        with torch.no_grad():
            self.update_key_encoder()
            k, dense_k, map_k = encode_shuffled(self.encoder_k, views[1], permutations)
            match = most_similar(map_q.flatten(2), map_k.flatten(2))  # NxP, Eq. 4
        q, k = unit(q), unit(k)
        matched = dense_k.flatten(2).gather(2, match[:, None].expand(-1, dense_k.shape[1], -1))
        with stage("machinery: loss"):
            loss, correct = info_nce(q, k, self.queue, self.temperature)  # Eq. 1
            dense_loss, dense_correct = info_nce(
                unit(cells(dense_q)), unit(cells(matched)), self.dense_queue, self.temperature
            )  # Eq. 2
        with stage("communication: gather"):
            keys = comm.all_gather(k)
            # A dense negative is the average of a map's dense vectors (Section 3.2).
            self.write(self.dense_queue, comm.all_gather(unit(dense_k.mean((2, 3)))))
        self.enqueue(keys)
        seen = (step + 1) * len(q) * comm.world_size()
        return {
            "loss": (1 - self.weight) * loss + self.weight * dense_loss,
            "accuracy": correct.float().mean(),
            "dense_accuracy": dense_correct.float().mean(),
            "spread": embedding_spread(q.detach()),
            "queue_fill": loss.new_full((), min(1.0, seen / len(self.queue))),
        }

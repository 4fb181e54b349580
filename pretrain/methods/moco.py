"""Momentum Contrast (He et al. 2020; v2: Chen et al. 2020), in the order of Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from moco_common import comm
from moco_common.errors import UserError
from pretrain.losses import info_nce
from pretrain.methods.base import REMEDIES, Method, Run
from pretrain.methods.components import (
    contrastive_head,
    embedding_spread,
    encode_keys,
    encoder_builder,
    follow,
    positive_temperature,
    shared_generator,
    unit,
)
from pretrain.modeling.resnet import ResNet
from pretrain.profiling import stage


def build_moco(cfg: CfgNode, run: Run) -> MoCo:
    """MoCo v1 or v2, as the keys of ``MOCO`` say."""
    return MoCo(
        encoder_builder(cfg, run, contrastive_head(cfg, run)),
        dim=cfg.MOCO.DIM,
        queue_size=cfg.MOCO.QUEUE_SIZE,
        momentum=cfg.MOCO.MOMENTUM,
        temperature=cfg.MOCO.TEMPERATURE,
        shuffle=cfg.MOCO.SHUFFLE_BN,
        seed=cfg.SEED,
    )


class MoCo(Method):
    """A query encoder, its momentum average, and a queue of the latter's keys.

    Args:
        build_encoder: makes the encoder; called twice. Its output is (N, dim).
        dim: C, length of a key.
        queue_size: K, any positive number; batches need not divide it.
        momentum: m of ``theta_k <- m theta_k + (1 - m) theta_q``, 0 <= m <= 1 (1 never moves).
        temperature: T of the softmax.
        shuffle: permute the keys' batch over all ranks (and BN groups) before the key encoder, so
            that BN statistics cannot tell a query its key (Section 3.3, "Shuffling BN").
        seed: of the initial queue and of the permutations.
    """

    num_views = 2
    queue: Tensor
    queue_ptr: Tensor
    remedies = {
        "collapse": "Lower SOLVER.BASE_LR or MOCO.MOMENTUM, or give the head BN (MOCO.MLP_BN "
        "True); on small data a shorter MOCO.QUEUE_SIZE helps too.",
        "plateau": REMEDIES["plateau"],
        "leak": "Usual causes: BN statistics that betray the key (MOCO.SHUFFLE_BN False, or one BN "
        "group), views that hardly differ (INPUT.MIN_SCALE too high), or a queue of a few hundred "
        "keys.",
    }

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
    ) -> None:
        super().__init__()
        if queue_size < 1:
            raise UserError(f"MOCO.QUEUE_SIZE is {queue_size}: it must be at least 1.")
        if not 0.0 <= momentum <= 1.0:
            raise UserError(f"MOCO.MOMENTUM is {momentum}: it must lie in [0, 1].")
        self.temperature = positive_temperature("MOCO.TEMPERATURE", temperature)
        self.momentum, self.shuffle, self.seed = momentum, shuffle, seed
        self.encoder_q = build_encoder()
        self.encoder_k = build_encoder()
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        noise = torch.randn(queue_size, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("queue", unit(noise))  # KxC
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.settling_images = queue_size

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """One step of Algorithm 1 on this rank's share of the batch.

        Args:
            views: query images and key images, each (N, 3, H, W) uint8 or normalised float.
            step: number of the step; with ``seed`` it determines the permutation.
            index: not used; negatives come from the queue.

        Returns:
            ``loss`` (with gradient) and, for the eyes, scalars without: ``accuracy`` (share of
            queries whose key is nearer than all negatives), ``spread`` (see `embedding_spread`),
            ``queue_fill`` (share of the queue that is keys and not initial noise).
        """
        query_images, key_images = views
        with stage("encoders: forward q"):
            q = unit(self.encoder_q(query_images))  # NxC
        with torch.no_grad():
            self.update_key_encoder()
            k = self.encode_keys(key_images, step)  # NxC
        with stage("machinery: loss"):
            loss, correct = info_nce(q, k, self.queue, self.temperature)
        with stage("communication: gather"):
            keys = comm.all_gather(k)  # W*NxC
        self.enqueue(keys)
        seen = (step + 1) * len(q) * comm.world_size()
        return {
            "loss": loss,
            "accuracy": correct.float().mean(),
            "spread": embedding_spread(q.detach()),
            "queue_fill": torch.tensor(min(1.0, seen / len(self.queue))),
        }

    @property
    def chance_loss(self) -> float:
        """Loss of an encoder that cannot tell keys apart: log(K+1)."""
        return math.log(len(self.queue) + 1)

    @stage("machinery: momentum update")
    def update_key_encoder(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q."""
        follow(self.encoder_k, self.encoder_q, self.momentum)

    @torch.no_grad()
    def encode_keys(self, images: Tensor, step: int) -> Tensor:
        """Keys of this rank's images, shuffled or not. Shape: (N, 3, H, W) -> (N, C)."""
        permutations = shared_generator(self.seed, step) if self.shuffle else None
        return encode_keys(self.encoder_k, images, permutations)

    @stage("machinery: enqueue")
    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write all ranks' keys over the oldest ones. The queue is a ring: a batch that reaches its
        end goes on at its start, and of a batch longer than the queue the last K keys stay."""
        size = len(self.queue)
        kept = keys[-size:]
        places = torch.arange(len(keys) - len(kept), len(keys), device=self.queue.device)
        # The pointer stays on the device: reading it here would wait for the GPU in every step.
        self.queue[(self.queue_ptr + places) % size] = kept.to(self.queue.dtype)
        self.queue_ptr.add_(len(keys)).remainder_(size)

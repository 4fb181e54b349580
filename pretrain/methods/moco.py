"""Momentum Contrast (He et al. 2020; v2: Chen et al. 2020), in the order of Algorithm 1: a query
encoder is trained to match each query with its key among a queue of keys of earlier batches, which
a momentum average of the encoder has computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from moco_common import comm
from moco_common.errors import UserError
from moco_common.text import counted
from pretrain.losses import info_nce
from pretrain.methods.base import REMEDIES, Memory, Method, Run
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

KEYS = {
    "MOCO.DIM": (128, "Length of a key."),
    "MOCO.QUEUE_SIZE": (
        "auto",
        "Number of negatives, K. It need not be a multiple of the batch. With auto, it is 65536 "
        "but at most a quarter of the images (half of them where that leaves fewer than 512): in a "
        "longer queue, an image's own old key becomes one of its negatives.",
    ),
    "MOCO.MOMENTUM": (
        0.999,
        "Momentum of the key encoder, m, which makes it an average over some 1 / (1 - m) steps. "
        "Short runs need a smaller value.",
    ),
    "MOCO.TEMPERATURE": (
        0.07,
        "Temperature of the softmax, T, by which similarities are divided. A lower value gives a "
        "sharper distribution.",
    ),
    "MOCO.MLP": (False, "MLP head of v2, with one hidden layer as wide as the features."),
    "MOCO.MLP_BN": (
        False,
        "BN after both layers of the MLP head. It is not part of v2, but leaves the initial "
        "plateau of the loss sooner.",
    ),
    "MOCO.SHUFFLE_BN": (
        True,
        "Permutation of the keys over ranks and BN groups, without which BN statistics may leak "
        "which key belongs to a query.",
    ),
}


class MoCo(Method):
    """A query encoder, its momentum average, and a queue of keys computed by the average.

    Args:
        build_encoder: makes the encoder; called twice. Its output is (N, dim).
        dim: C, length of a key.
        queue_size: K, any positive number; it need not be a multiple of the batch.
        momentum: m of ``theta_k <- m theta_k + (1 - m) theta_q``, 0 <= m <= 1 (with 1 the key
            encoder never changes).
        temperature: T of the softmax.
        shuffle: whether to permute the batch of keys over all ranks (and BN groups) before the key
            encoder, so that BN statistics do not leak which key belongs to a query (Section 3.3,
            "Shuffling BN").
        seed: of the initial queue and of the permutations.
    """

    view_names = ("query view", "key view")
    queue: Tensor
    queue_ptr: Tensor
    remedies = {
        "collapse": "Lower SOLVER.BASE_LR or MOCO.MOMENTUM, or add BN to the head (MOCO.MLP_BN "
        "True); on small data, a smaller MOCO.QUEUE_SIZE helps too.",
        "plateau": REMEDIES["plateau"],
        "leak": "Usual causes: BN statistics that identify the key (MOCO.SHUFFLE_BN False, or only "
        "one BN group), views that hardly differ (INPUT.MIN_SCALE too high), or a queue of only a "
        "few hundred keys.",
    }

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> MoCo:
        """Build MoCo v1 or v2 from ``MOCO``."""
        return cls(encoder_builder(cfg, run, contrastive_head(cfg, run)), **cls.settings(cfg))

    @classmethod
    def settings(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the arguments of the constructor, but for the encoder."""
        return {
            "dim": cfg.MOCO.DIM,
            "queue_size": cfg.MOCO.QUEUE_SIZE,
            "momentum": cfg.MOCO.MOMENTUM,
            "temperature": cfg.MOCO.TEMPERATURE,
            "shuffle": cfg.MOCO.SHUFFLE_BN,
            "seed": cfg.SEED,
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
        self.register_buffer("queue", noise(queue_size, dim, seed))  # KxC
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.settling_images = queue_size

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Run one step of Algorithm 1 on this rank's share of the batch.

        Args:
            views: query images and key images, each (N, 3, H, W) uint8 or normalised float.
            step: number of the step; together with ``seed`` it determines the permutation.
            index: not used; negatives come from the queue.

        Returns:
            ``loss`` (with gradient) and scalars without gradient: ``accuracy`` (fraction of queries
            whose key is nearer than all negatives), ``spread`` (see `embedding_spread`) and
            ``queue_fill`` (fraction of the queue that holds keys and not the initial noise).
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
            "queue_fill": loss.new_full((), min(1.0, seen / len(self.queue))),
        }

    @property
    def chance_loss(self) -> float:
        """log(K+1): all keys look alike."""
        return math.log(len(self.queue) + 1)

    @stage("machinery: momentum update")
    def update_key_encoder(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q."""
        follow(self.encoder_k, self.encoder_q, self.momentum)

    @torch.no_grad()
    def encode_keys(self, images: Tensor, step: int) -> Tensor:
        """Compute the keys of this rank's images. Shape: (N, 3, H, W) -> (N, C)."""
        permutations = shared_generator(self.seed, step) if self.shuffle else None
        return encode_keys(self.encoder_k, images, permutations)

    @stage("machinery: enqueue")
    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by those of all ranks. The queue is a ring buffer: a batch that
        reaches its end continues at its start, and a batch longer than the queue leaves its last K
        keys."""
        self.write(self.queue, keys)
        self.queue_ptr.add_(len(keys)).remainder_(len(self.queue))

    def write(self, queue: Tensor, keys: Tensor) -> None:
        """Write keys to a queue from the pointer on, which stays."""
        size = len(queue)
        kept = keys[-size:]
        places = torch.arange(len(keys) - len(kept), len(keys), device=queue.device)
        # The pointer stays on the device: reading it here would wait for the GPU at every step.
        queue[(self.queue_ptr + places) % size] = kept.to(queue.dtype)

    def memory(self, step: int, batch_size: int) -> Memory:
        """The queue, which is filled from its start."""
        size, seen, pointer = len(self.queue), step * batch_size, int(self.queue_ptr)
        filled, notes = min(seen, size), []
        if pointer != seen % size:
            notes.append(
                f"the queue's pointer is at {pointer}, but {counted(step, 'step')} of "
                f"{counted(batch_size, 'key')} leave it at {seen % size}: the checkpoint was "
                f"assembled from several."
            )
        return Memory(
            "queue",
            size,
            filled,
            self.queue[:filled],
            pointer,
            self.momentum,
            stale="raise MOCO.MOMENTUM or lower MOCO.QUEUE_SIZE",
            notes=tuple(notes),
        )


def noise(size: int, dim: int, seed: int) -> Tensor:
    """Return random unit vectors, (size, dim), for a queue that holds no keys yet."""
    return unit(torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)))

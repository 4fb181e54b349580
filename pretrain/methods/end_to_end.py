"""The end-to-end mechanism (He et al. 2020, Figure 2a): MoCo's pretext task with the batch as the
dictionary and a key encoder that is trained by gradient. It reads the keys of ``MOCO``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from moco_common import comm
from pretrain.losses import batch_info_nce
from pretrain.methods.base import Method, Run
from pretrain.methods.components import (
    contrastive_head,
    embedding_spread,
    encode_keys,
    encoder_builder,
    positive_temperature,
    shared_generator,
    unit,
)
from pretrain.modeling.resnet import ResNet

SHARED = ("MOCO",)


class EndToEnd(Method):
    """A query encoder and a key encoder, both trained by gradient.

    The dictionary is the batch of B images, and the backward pass needs the activations of every
    key's image, so memory grows in proportion to the dictionary. A ResNet-50 in float32 keeps 82
    MiB for an image of 224 pixels, so both encoders take 41 GiB at B = 256 and 164 GiB at B = 1024,
    divided among the ranks. (A key in MoCo's queue takes 512 bytes.)

    Args:
        build_encoder: makes the encoder; called twice. Its output is (N, C).
        batch_size: B, over all ranks.
        temperature: T of the softmax.
        shuffle: whether to permute the batch of keys over all ranks (and BN groups) before the key
            encoder, so that BN statistics do not leak which key belongs to a query (Section 3.3
            applies it to this mechanism too). The gradient is permuted back.
        seed: of the permutations.
    """

    view_names = ("query view", "key view")

    def __init__(
        self,
        build_encoder: Callable[[], ResNet],
        *,
        batch_size: int,
        temperature: float = 0.07,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.temperature = positive_temperature("MOCO.TEMPERATURE", temperature)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.encoder_q = build_encoder()
        self.encoder_k = build_encoder()
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> EndToEnd:
        """Build the mechanism from ``MOCO``."""
        return cls(
            encoder_builder(cfg, run, contrastive_head(cfg, run)),
            batch_size=cfg.SOLVER.BATCH_SIZE,
            temperature=cfg.MOCO.TEMPERATURE,
            shuffle=cfg.MOCO.SHUFFLE_BN,
            seed=cfg.SEED,
        )

    @property
    def chance_loss(self) -> float:
        """log(B): all keys of the batch look alike."""
        return math.log(self.batch_size)

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Compare queries from the first view with keys from the second; ``index`` is not used."""
        query_images, key_images = views
        q = unit(self.encoder_q(query_images))  # NxC
        keys = comm.all_gather(self.encode_keys(key_images, step))  # BxC
        positive = comm.rank() * len(q) + torch.arange(len(q), device=q.device)  # N
        loss, correct = batch_info_nce(q, keys, positive, self.temperature)
        return {
            "loss": loss,
            "accuracy": correct.float().mean(),
            "spread": embedding_spread(q.detach()),
        }

    def encode_keys(self, images: Tensor, step: int) -> Tensor:
        """Compute the keys of this rank's images. Shape: (N, 3, H, W) -> (N, C)."""
        permutations = shared_generator(self.seed, step) if self.shuffle else None
        return encode_keys(self.encoder_k, images, permutations)

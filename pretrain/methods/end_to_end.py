"""The end-to-end mechanism (He et al. 2020, Figure 2a): the batch is the dictionary."""

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


def build_end_to_end(cfg: CfgNode, run: Run) -> EndToEnd:
    """The rival of MoCo under MoCo's own pretext task: it reads ``MOCO``'s keys."""
    return EndToEnd(
        encoder_builder(cfg, run, contrastive_head(cfg, run)),
        batch_size=cfg.SOLVER.BATCH_SIZE,
        temperature=cfg.MOCO.TEMPERATURE,
        shuffle=cfg.MOCO.SHUFFLE_BN,
        seed=cfg.SEED,
    )


class EndToEnd(Method):
    """A query encoder and a key encoder, both trained by gradient.

    The dictionary is the batch, B, and the backward pass needs the activations of every key's
    image: memory grows in proportion to the dictionary. A ResNet-50 in float32 keeps 82 MiB of an
    image of 224 pixels, so both encoders take 41 GiB at B = 256 and 164 GiB at 1024, shared out
    over the ranks. (A key in MoCo's queue takes 512 bytes.)

    Args:
        build_encoder: makes the encoder; called twice. Its output is (N, C).
        batch_size: B, over all ranks.
        temperature: T of the softmax.
        shuffle: permute the keys' batch over all ranks (and BN groups) before the key encoder, so
            that BN statistics cannot tell a query its key (Section 3.3 has it for this mechanism
            too). The gradient takes the same way back.
        seed: of the permutations.
    """

    num_views = 2

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

    @property
    def chance_loss(self) -> float:
        """log(B): one of the batch's keys is the right one."""
        return math.log(self.batch_size)

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Queries from the first view, keys from the second; ``index`` is not used."""
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
        """Keys of this rank's images, shuffled or not. Shape: (N, 3, H, W) -> (N, C)."""
        permutations = shared_generator(self.seed, step) if self.shuffle else None
        return encode_keys(self.encoder_k, images, permutations)

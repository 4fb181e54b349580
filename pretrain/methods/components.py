"""Building blocks of methods: encoders and heads from a configuration, shuffled and joint encoding
of views, momentum averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from moco_common import comm
from moco_common.errors import UserError
from pretrain import distributed
from pretrain.methods.base import Run
from pretrain.modeling.batch_norm import SplitBatchNorm1d
from pretrain.modeling.heads import Head, linear_head, mlp_head
from pretrain.modeling.resnet import ResNet
from pretrain.profiling import stage


def encoder_builder(cfg: CfgNode, run: Run, head: Head) -> Callable[[], ResNet]:
    """Return a function that builds the ResNet of ``MODEL`` with ``head`` as its ``fc``."""
    return partial(
        ResNet,
        cfg.MODEL.DEPTH,
        width=cfg.MODEL.WIDTH,
        groups=cfg.MODEL.GROUPS,
        width_per_group=cfg.MODEL.WIDTH_PER_GROUP,
        bn_groups=run.bn_groups,
        head=head,
    )


def contrastive_head(cfg: CfgNode, run: Run) -> Head:
    """The head of the MoCo paper's three mechanisms, from ``MOCO.DIM``, ``MLP`` and ``MLP_BN``."""
    norm = partial(SplitBatchNorm1d, groups=run.bn_groups) if cfg.MOCO.MLP_BN else None
    if norm is not None and not cfg.MOCO.MLP:
        raise UserError("MOCO.MLP_BN True requires the MLP head: set MOCO.MLP True as well.")
    return mlp_head(cfg.MOCO.DIM, batch_norm=norm) if cfg.MOCO.MLP else linear_head(cfg.MOCO.DIM)


def unit(x: Tensor) -> Tensor:
    """Scale rows to length 1. Shape: (N, C) -> (N, C)."""
    return F.normalize(x, dim=1)


def cells(x: Tensor) -> Tensor:
    """Return the cells of maps as rows. Shape: (N, C, ...) -> (N * P, C)."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1)


def embedding_spread(embeddings: Tensor) -> Tensor:
    """Root mean square distance of unit vectors from their mean, in [0, 1].

    It is 0 if all are equal (collapse), and 1 if their mean is zero, as for vectors spread evenly
    over the sphere. Shape: (N, C) -> ().
    """
    return (1.0 - embeddings.mean(0).square().sum()).clamp_min(0.0).sqrt()


def mean_of_valid(values: Tensor, valid: Tensor) -> Tensor:
    """Return this rank's part of the mean over the valid entries of all ranks: the mean over the
    ranks of the result is that mean. It is 0 without a valid entry. Shape: (N,), (N,) -> ()."""
    count = distributed.all_reduce_sum(valid.sum()).clamp(min=1)
    return torch.where(valid, values, 0.0).sum() * comm.world_size() / count


def shared_generator(seed: int, step: int) -> torch.Generator:
    """Generator for random choices of a step that must be the same on all ranks."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def encode_keys(encoder: nn.Module, images: Tensor, permutations: torch.Generator | None) -> Tensor:
    """Encode this rank's images to unit vectors by `encode_shuffled`.

    Shape: (N, 3, H, W) -> (N, C).
    """
    (k,) = encode_shuffled(lambda batch: (unit(encoder(batch)),), images, permutations)
    return k


def encode_shuffled(
    encode: Callable[[Tensor], tuple[Tensor, ...]],
    images: Tensor,
    permutations: torch.Generator | None,
) -> tuple[Tensor, ...]:
    """Encode this rank's images in batches mixed with images of other ranks.

    The batch of all ranks (and BN groups) is permuted before the encoder and permuted back after
    it, so that BN statistics do not leak which key belongs to a query (He et al. 2020, Section 3.3,
    "Shuffling BN"). Gradients are permuted back too.

    Args:
        encode: (N, 3, H, W) -> tensors of N rows.
        permutations: draws the permutation, the same on every rank; None for no permutation.
    """
    if permutations is None:
        with stage("encoders: forward k"):
            return encode(images)
    total = len(images) * comm.world_size()
    permutation = torch.randperm(total, generator=permutations)
    with stage("communication: shuffle"):
        shuffled = distributed.permute_batch(images, permutation)
    with stage("encoders: forward k"):
        outputs = encode(shuffled)
    with stage("communication: unshuffle"):
        back = permutation.argsort()
        return tuple(distributed.permute_batch(output, back) for output in outputs)


def encode_together(encoder: nn.Module, views: Sequence[Tensor], bn_groups: int) -> list[Tensor]:
    """Encode views of one size in one pass, in which they share BN statistics.

    Slice g of ``bn_groups`` holds the g-th share of every view, as on a rank of its own.

    Shape: V times (N, 3, H, W) -> V times (N, C).
    """
    shares = zip(*(view.chunk(bn_groups) for view in views), strict=True)
    together = torch.cat([part for share in shares for part in share])  # V*Nx3xHxW
    parts = encoder(together).chunk(bn_groups * len(views))
    return [torch.cat(parts[v :: len(views)]) for v in range(len(views))]


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """Update average <- m average + (1 - m) network over parameters, but not over BN buffers."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1.0 - momentum)


def positive_temperature(key: str, value: float) -> float:
    """Return ``value``; raise `UserError` naming ``key`` unless it is above 0."""
    if value <= 0.0:
        raise UserError(f"{key} is {value}: it must be above 0.")
    return value

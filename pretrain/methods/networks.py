"""What methods are made of: the encoder that ``MODEL`` names, heads, views through an encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from pretrain.encoders import ResNet, SplitBatchNorm1d
from pretrain.errors import UserError
from pretrain.methods.base import Run
from pretrain.methods.moco import Head, linear_head, mlp_head


def encoder_builder(cfg: CfgNode, run: Run, head: Head) -> Callable[[], ResNet]:
    """Makes a new ResNet as ``MODEL`` says, with ``head`` as its ``fc``, at each call."""
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
    """The head of the MoCo paper's three mechanisms, as ``MOCO.DIM``, ``MLP``, ``MLP_BN`` say."""
    norm = partial(SplitBatchNorm1d, groups=run.bn_groups) if cfg.MOCO.MLP_BN else None
    if norm is not None and not cfg.MOCO.MLP:
        raise UserError("MOCO.MLP_BN True needs the MLP head: set MOCO.MLP True as well.")
    return mlp_head(cfg.MOCO.DIM, batch_norm=norm) if cfg.MOCO.MLP else linear_head(cfg.MOCO.DIM)


def mlp(features: int, hidden: int, dim: int, bn_groups: int = 1) -> nn.Sequential:
    """features -> hidden -> BN -> ReLU -> dim: projectors of BYOL and SwAV, BYOL's predictor."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        SplitBatchNorm1d(hidden, bn_groups),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, dim),
    )


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1. Shape: (N, C) -> (N, C)."""
    return F.normalize(x, dim=1)


def encode_together(encoder: nn.Module, views: Sequence[Tensor], bn_groups: int) -> list[Tensor]:
    """Views of one size through the encoder in one pass, whose BN statistics they share.

    Slice g of ``bn_groups`` holds the g-th share of every view, as a rank of its own would.

    Shape: V times (N, 3, H, W) -> V times (N, C).
    """
    shares = zip(*(view.chunk(bn_groups) for view in views), strict=True)
    together = torch.cat([part for share in shares for part in share])  # V*Nx3xHxW
    parts = encoder(together).chunk(bn_groups * len(views))
    return [torch.cat(parts[v :: len(views)]) for v in range(len(views))]


def positive_temperature(key: str, value: float) -> float:
    """``value``, if it can be a temperature; `UserError` naming ``key`` if not."""
    if value <= 0.0:
        raise UserError(f"{key} is {value}: it must be above 0.")
    return value

"""Projection heads."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pretrain.modeling.batch_norm import SplitBatchNorm1d

Head = Callable[[int], nn.Module]


def linear_head(dim: int) -> Head:
    """MoCo v1: features -> dim."""
    return lambda features: nn.Linear(features, dim)


def mlp_head(dim: int, *, batch_norm: Callable[[int], nn.Module] | None = None) -> Head:
    """MoCo v2: features -> features -> ReLU -> dim (2048-2048-128 for ResNet-50).

    ``batch_norm`` adds a normalisation after each of the two layers. It is *not* in the paper of
    v2 (v3's head has it): features behind a ReLU share a large mean, so without it all keys start
    nearly parallel, and a small budget is spent on the plateau at log(K+1).
    """

    def build(features: int) -> nn.Module:
        hidden, last = nn.Linear(features, features), nn.Linear(features, dim)
        if batch_norm is None:
            return nn.Sequential(hidden, nn.ReLU(inplace=True), last)
        return nn.Sequential(
            hidden,
            batch_norm(features),
            nn.ReLU(inplace=True),
            last,
            batch_norm(dim),
        )

    return build


def mlp(features: int, hidden: int, dim: int, bn_groups: int = 1) -> nn.Sequential:
    """features -> hidden -> BN -> ReLU -> dim: projectors of BYOL and SwAV, BYOL's predictor."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        SplitBatchNorm1d(hidden, bn_groups),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, dim),
    )

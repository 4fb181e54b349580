"""Projection heads."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pretrain.modeling.batch_norm import SplitBatchNorm1d

Head = Callable[[int], nn.Module]


def linear_head(dim: int) -> Head:
    """Return a builder of MoCo v1's head: features -> dim."""
    return lambda features: nn.Linear(features, dim)


def mlp_head(dim: int, *, batch_norm: Callable[[int], nn.Module] | None = None) -> Head:
    """Return a builder of MoCo v2's head: features -> features -> ReLU -> dim.

    The layers are 2048-2048-128 for ResNet-50. ``batch_norm`` adds a normalisation layer after each
    linear layer. It is *not* in the v2 paper (the v3 head has it): features after a ReLU have a
    large common mean, so that without it all keys start nearly parallel, and a short run never
    leaves the plateau at log(K+1).
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
    """Return features -> hidden -> BN -> ReLU -> dim, as in the heads of BYOL and SwAV."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        SplitBatchNorm1d(hidden, bn_groups),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, dim),
    )

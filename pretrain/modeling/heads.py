"""Projection heads, of vectors and of feature maps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pretrain.modeling.batch_norm import SplitBatchNorm1d, SplitBatchNorm2d

Head = Callable[[int], nn.Module]


class MapHead(nn.Module):
    """Base of the heads that a ResNet gives its feature map, (N, C, h, w), and not the average."""


class InstanceAndDense(MapHead):
    """One head for the average of the feature map and one for each of its cells.

    Shape: (N, C, h, w) -> (N, D), (N, D, h, w), and the feature map itself.
    """

    def __init__(self, instance: nn.Module, dense: nn.Module) -> None:
        super().__init__()
        self.instance, self.dense = instance, dense

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.instance(x.mean((2, 3))), self.dense(x), x


def per_cell(features: int, dim: int) -> nn.Conv2d:
    """Return a linear layer for each cell of a map: a 1x1 convolution."""
    return nn.Conv2d(features, dim, 1)


def linear_head(dim: int) -> Head:
    """Return a builder of MoCo v1's head: features -> dim."""
    return lambda features: nn.Linear(features, dim)


def mlp_head(
    dim: int,
    *,
    batch_norm: Callable[[int], nn.Module] | None = None,
    linear: Callable[[int, int], nn.Module] = nn.Linear,
) -> Head:
    """Return a builder of MoCo v2's head: features -> features -> ReLU -> dim.

    The layers are 2048-2048-128 for ResNet-50. ``batch_norm`` adds a normalisation layer after each
    linear layer. It is *not* in the v2 paper (the v3 head has it): features after a ReLU have a
    large common mean, so that without it all keys start nearly parallel, and a short run never
    leaves the plateau at log(K+1). With ``linear=per_cell``, the head acts on each cell of a map.
    """

    def build(features: int) -> nn.Module:
        hidden, last = linear(features, features), linear(features, dim)
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


def mlp(
    features: int, hidden: int, dim: int, bn_groups: int = 1, *, on_map: bool = False
) -> nn.Sequential:
    """Return features -> hidden -> BN -> ReLU -> dim, as in the heads of BYOL and SwAV.

    Args:
        on_map: True to act on each cell of a map, (N, features, h, w) -> (N, dim, h, w).
    """
    linear = per_cell if on_map else nn.Linear
    norm = SplitBatchNorm2d if on_map else SplitBatchNorm1d
    return nn.Sequential(
        linear(features, hidden),
        norm(hidden, bn_groups),
        nn.ReLU(inplace=True),
        linear(hidden, dim),
    )

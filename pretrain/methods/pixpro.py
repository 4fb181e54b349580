"""PixPro (Xie et al. 2021, "Propagate Yourself: Exploring Pixel-Level Consistency"), in the order
of its Section 3.2: each cell of one view's feature map, smoothed by the cells that resemble it,
predicts the cells of the other view that lie at the same place of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from moco_common.errors import UserError
from pretrain.losses import cosine_regression, pixel_consistency, propagate
from pretrain.methods.base import REMEDIES, Method, Run
from pretrain.methods.byol import target_momentum
from pretrain.methods.components import cells, embedding_spread, encoder_builder, follow, unit
from pretrain.methods.correspondence import most_similar, nearby
from pretrain.modeling.heads import InstanceAndDense, mlp, per_cell
from pretrain.modeling.resnet import ResNet

KEYS = {
    "PIXPRO.HIDDEN": (4096, "Hidden units of the projectors and of the instance predictor."),
    "PIXPRO.DIM": (256, "Length of a projection."),
    "PIXPRO.THRESHOLD": (
        0.7,
        "Largest distance of a positive pair of cells in the image, in diagonals of a cell.",
    ),
    "PIXPRO.SHARPNESS": (
        2.0,
        "Exponent of the similarities in the propagation module, gamma, at least 1.",
    ),
    "PIXPRO.INSTANCE_WEIGHT": (
        0.0,
        "Weight of the instance branch, alpha: BYOL's loss of the averaged features. 0 for none.",
    ),
    "PIXPRO.MOMENTUM": (
        0.99,
        "Momentum of the target network at the first step. It rises to 1 by the end of the run.",
    ),
}


class PixPro(Method):
    """A network with a propagation module that predicts its moving average, cell by cell.

    Args:
        build_encoder: makes backbone and projectors, with `InstanceAndDense` as the head; called
            twice.
        transform: g of the propagation module, (N, C, h, w) -> (N, C, h, w).
        predictor: of the instance branch, (N, C) -> (N, C); None without one.
        threshold: largest distance of a positive pair, in diagonals of a cell.
        sharpness: gamma of the propagation module.
        instance_weight: alpha of the instance branch.
        momentum: of the target at the first step; it rises to 1 along half a cosine.
    """

    view_names = ("view 1 (T)", "view 2 (T')")  # each goes through both networks
    uses_places = True
    remedies = REMEDIES | {
        "collapse": "Lower SOLVER.BASE_LR, or raise PIXPRO.MOMENTUM: the target must lag behind."
    }

    def __init__(
        self,
        build_encoder: Callable[[], ResNet],
        transform: nn.Module,
        predictor: nn.Module | None,
        *,
        threshold: float = 0.7,
        sharpness: float = 2.0,
        instance_weight: float = 0.0,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise UserError(f"PIXPRO.MOMENTUM is {momentum}: it must lie in [0, 1].")
        if threshold <= 0.0 or sharpness < 1.0 or instance_weight < 0.0:
            raise UserError(
                f"PIXPRO.THRESHOLD, SHARPNESS and INSTANCE_WEIGHT are {threshold}, {sharpness} and "
                f"{instance_weight}: they must be above 0, at least 1 and at least 0."
            )
        self.threshold, self.sharpness, self.momentum = threshold, sharpness, momentum
        self.instance_weight = instance_weight
        self.encoder_q = build_encoder()
        self.transform, self.predictor = transform, predictor
        self.target = build_encoder()
        self.target.load_state_dict(self.encoder_q.state_dict())
        self.target.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> PixPro:
        """Build PixPro from ``PIXPRO``."""
        hidden, dim, weight = cfg.PIXPRO.HIDDEN, cfg.PIXPRO.DIM, cfg.PIXPRO.INSTANCE_WEIGHT

        def head(features: int) -> nn.Module:
            dense = mlp(features, hidden, dim, run.bn_groups, on_map=True)
            instance = mlp(features, hidden, dim, run.bn_groups) if weight else nn.Identity()
            return InstanceAndDense(instance, dense)

        return cls(
            encoder_builder(cfg, run, head),
            per_cell(dim, dim),
            mlp(dim, hidden, dim, run.bn_groups) if weight else None,
            threshold=cfg.PIXPRO.THRESHOLD,
            sharpness=cfg.PIXPRO.SHARPNESS,
            instance_weight=weight,
            momentum=cfg.PIXPRO.MOMENTUM,
        )

    @property
    def chance_loss(self) -> None:
        """None: an encoder that has learned nothing can have any loss, even 0."""
        return None

    def forward(
        self, views: Sequence[Tensor], step: int, index: Tensor, places: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Predict each view's cells from the other's; each is a batch with its own BN statistics.

        Returns:
            ``loss``, ``spread`` of the cells, and ``overlap``, the fraction of images with a
            positive pair.
        """
        assert places is not None
        online = [self.encoder_q(view) for view in views]  # NxC, NxCxhxw, map
        with torch.no_grad():
            target = [self.target(view) for view in views]
            height, width = online[0][1].shape[2:]
            positive = nearby(places[0], places[1], height, width, self.threshold)  # NxPxP
        y1, y2 = (self.propagated(dense) for _, dense, _ in online)  # NxCxP
        x1, x2 = (dense.flatten(2) for _, dense, _ in target)  # NxCxP
        loss = pixel_consistency(y1, x2, positive)
        loss = loss + pixel_consistency(y2, x1, positive.transpose(1, 2))
        if self.predictor is not None:
            p1, p2 = (self.predictor(z) for z, _, _ in online)  # NxC
            instance = cosine_regression(p1, target[1][0]) + cosine_regression(p2, target[0][0])
            loss = loss + self.instance_weight * instance
        return {
            "loss": loss,
            "spread": embedding_spread(unit(cells(online[0][1].detach()))),
            "overlap": positive.any(2).any(1).float().mean(),
        }

    def propagated(self, x: Tensor) -> Tensor:
        """The propagation module. Shape: (N, C, h, w) -> (N, C, P)."""
        return propagate(x.flatten(2), self.transform(x).flatten(2), self.sharpness)

    def match(self, views: Sequence[Tensor]) -> Tensor:
        """By the propagated predictions and the target's projections."""
        (_, online, _), (_, target, _) = self.encoder_q(views[0]), self.target(views[1])
        found = most_similar(self.propagated(online), target.flatten(2))
        return found.view(-1, *online.shape[2:])

    def project(self, features: Tensor) -> Tensor:
        """The dense projector's embeddings, as of a map of one cell."""
        embeddings: Tensor = self.encoder_q.get_submodule("fc.dense")(features[:, :, None, None])
        return embeddings.flatten(1)

    def after_update(self, step: int, total_steps: int) -> None:
        """Update the target network."""
        follow(self.target, self.encoder_q, target_momentum(self.momentum, step, total_steps))

"""BYOL (Grill et al. 2020, "Bootstrap Your Own Latent"), in the order of its Section 3.1: an online
network predicts, from one view, the projection that its moving average computes from the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from moco_common.errors import UserError
from pretrain.losses import cosine_regression
from pretrain.methods.base import REMEDIES, Method, Run
from pretrain.methods.components import embedding_spread, encoder_builder, follow, unit
from pretrain.modeling.heads import mlp
from pretrain.modeling.resnet import ResNet

KEYS = {
    "BYOL.HIDDEN": (4096, "Hidden units of the projector and of the predictor."),
    "BYOL.DIM": (256, "Length of a projection."),
    "BYOL.MOMENTUM": (
        0.996,
        "Momentum of the target network at the first step, tau. It rises to 1 by the end of the "
        "run.",
    ),
}


class BYOL(Method):
    """An online network that predicts the projections of its moving average.

    Args:
        build_encoder: makes f and g of the paper, with the projector as the encoder's ``fc``;
            called twice, for the online and the target network. Its output is (N, C).
        predictor: q of the paper, (N, C) -> (N, C), in the online network only.
        momentum: tau at the first step; it rises to 1 along half a cosine.
    """

    view_names = ("view 1 (T)", "view 2 (T')")  # each goes through both networks

    def __init__(
        self,
        build_encoder: Callable[[], ResNet],
        predictor: nn.Module,
        *,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise UserError(f"BYOL.MOMENTUM is {momentum}: it must lie in [0, 1].")
        self.momentum = momentum
        self.encoder_q = build_encoder()
        self.predictor = predictor
        self.target = build_encoder()
        self.target.load_state_dict(self.encoder_q.state_dict())
        self.target.requires_grad_(False)

    remedies = REMEDIES | {
        "collapse": "Lower SOLVER.BASE_LR, or raise BYOL.MOMENTUM: the target must lag behind."
    }

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> BYOL:
        """Build BYOL from ``BYOL``."""
        hidden, dim = cfg.BYOL.HIDDEN, cfg.BYOL.DIM
        return cls(
            encoder_builder(cfg, run, lambda features: mlp(features, hidden, dim, run.bn_groups)),
            mlp(dim, hidden, dim, run.bn_groups),
            momentum=cfg.BYOL.MOMENTUM,
        )

    @property
    def chance_loss(self) -> None:
        """None: an encoder that has learned nothing can have any loss, even 0."""
        return None

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Predict each view from the other; each is a batch with its own BN statistics."""
        projections = [self.encoder_q(view) for view in views]  # NxC each
        p1, p2 = (self.predictor(projection) for projection in projections)  # NxC
        with torch.no_grad():
            z1, z2 = (self.target(view) for view in views)  # NxC
        # Eq. 2, symmetrised; in [0, 8].
        loss = cosine_regression(p1, z2) + cosine_regression(p2, z1)
        return {"loss": loss, "spread": embedding_spread(unit(projections[0].detach()))}

    def after_update(self, step: int, total_steps: int) -> None:
        """xi <- tau xi + (1 - tau) theta."""
        tau = target_momentum(self.momentum, step, total_steps)
        follow(self.target, self.encoder_q, tau)


def target_momentum(base: float, step: int, total_steps: int) -> float:
    """Return tau = 1 - (1 - base) (cos(pi k / K) + 1) / 2, from ``base`` at step 0 to 1 at the end
    (Section 3.2, "Optimization")."""
    return 1.0 - (1.0 - base) * (math.cos(math.pi * step / total_steps) + 1.0) / 2.0

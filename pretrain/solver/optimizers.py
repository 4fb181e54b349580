"""Optimisers: SGD, and LARS for large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from moco_common.errors import UserError

OPTIMIZERS = ("sgd", "lars")


def build_optimizer(cfg: CfgNode, method: nn.Module) -> torch.optim.Optimizer:
    """Build ``SOLVER.OPTIMIZER`` for all parameters of ``method`` that require gradients.

    With ``sgd``, weight decay applies to all of them, as in MoCo. With ``lars``, BN parameters and
    biases (all one-dimensional parameters) are excluded from weight decay and from the layer-wise
    scaling, as in SimCLR and BYOL.

    Raises:
        UserError: the optimiser is unknown.
    """
    trained = [p for p in method.parameters() if p.requires_grad]
    lr, momentum, weight_decay = (
        cfg.SOLVER.BASE_LR,
        cfg.SOLVER.MOMENTUM,
        cfg.SOLVER.WEIGHT_DECAY,
    )
    if cfg.SOLVER.OPTIMIZER == "sgd":
        return torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if cfg.SOLVER.OPTIMIZER == "lars":
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.dim() > 1]},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "scaled": False},
        ]
        return LARS(
            [group for group in groups if group["params"]],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=cfg.SOLVER.TRUST_COEFFICIENT,
        )
    raise UserError(
        f"SOLVER.OPTIMIZER is '{cfg.SOLVER.OPTIMIZER}': choose one of {', '.join(OPTIMIZERS)}."
    )


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, Algorithm 1), with each tensor a layer.

    For gradient g, weights w, weight decay b, momentum m, learning rate r and trust coefficient
    eta::

        lambda = eta |w| / (|g| + b |w|)        (1 if |w| or |g| is 0, or if not ``scaled``)
        v <- m v + r lambda (g + b w)
        w <- w - v

    As in the paper, the learning rate is applied before the momentum; ``torch.optim.SGD`` applies
    it after, which differs whenever the learning rate changes.

    Args:
        params: parameters or parameter groups; a group with ``scaled=False`` uses lambda = 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "scaled": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient, once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients: list[Tensor] = [p.grad for p in weights]
            updates = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            if group["scaled"]:
                torch._foreach_mul_(updates, _trust_ratios(weights, gradients, group))
            torch._foreach_mul_(updates, group["lr"])
            for p in weights:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            velocities = [self.state[p]["momentum_buffer"] for p in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates)
            torch._foreach_sub_(weights, velocities)
        return loss


def _trust_ratios(
    weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
) -> list[Tensor]:
    w = torch.stack(torch._foreach_norm(weights))
    g = torch.stack(torch._foreach_norm(gradients))
    ratios = group["trust_coefficient"] * w / (g + group["weight_decay"] * w)
    return list(torch.where((w > 0) & (g > 0), ratios, torch.ones_like(ratios)).unbind())

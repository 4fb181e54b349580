"""The optimiser that a recipe names."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode
from torch import nn


def build_optimizer(cfg: CfgNode, method: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum over all parameters of ``method`` that are trained by gradient."""
    return torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad],
        lr=cfg.SOLVER.BASE_LR,
        momentum=cfg.SOLVER.MOMENTUM,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
    )

"""The optimizer, with a learning rate for each stage of the backbone if the config asks for it."""

from collections.abc import Sequence

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from torch import nn

from moco_common.errors import UserError
from moco_det.modeling.detector import STAGES, stage_of


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build Detectron2's SGD; ``SOLVER.STAGE_LR_FACTORS`` scales the rates of the stages."""
    factors = cfg.SOLVER.STAGE_LR_FACTORS
    if not factors:
        optimizer: torch.optim.Optimizer = solver.build_optimizer(cfg, model)
        return optimizer
    groups = solver.get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda name: rate_factor(name, factors),
    )
    sgd = torch.optim.SGD(
        groups,
        lr=cfg.SOLVER.BASE_LR,
        momentum=cfg.SOLVER.MOMENTUM,
        nesterov=cfg.SOLVER.NESTEROV,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        foreach=True,
    )
    clipped: torch.optim.Optimizer = solver.build.maybe_add_gradient_clipping(cfg, sgd)
    return clipped


def rate_factor(name: str, factors: Sequence[float]) -> float:
    """Return the factor of a parameter's learning rate: 1 outside the backbone's stages."""
    stage = stage_of(name)
    return 1.0 if stage is None else float(factors[STAGES.index(stage)])


def check_factors(cfg: CfgNode) -> None:
    """Check ``SOLVER.STAGE_LR_FACTORS`` before training.

    Raises:
        UserError: it is not a list of one positive number for each stage.
    """
    factors = cfg.SOLVER.STAGE_LR_FACTORS
    numbers = all(isinstance(f, int | float) and not isinstance(f, bool) for f in factors)
    if factors and (len(factors) != len(STAGES) or not numbers or min(factors) <= 0):
        raise UserError(
            f"SOLVER.STAGE_LR_FACTORS is {list(factors)}: give {len(STAGES)} positive numbers, for "
            f"{', '.join(STAGES)}; MODEL.BACKBONE.FREEZE_AT freezes stages."
        )
    if factors and cfg.SOLVER.BIAS_LR_FACTOR != 1:
        raise UserError(
            "SOLVER.STAGE_LR_FACTORS and SOLVER.BIAS_LR_FACTOR exclude each other: set the latter "
            "to 1."
        )

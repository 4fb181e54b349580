"""The methods by name. A builder is the only place where a method meets the configuration.

What a method is stands in `pretrain.methods.base`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fvcore.common.config import CfgNode

from pretrain import distributed
from pretrain.encoders import ResNet, SplitBatchNorm1d, bn_groups_per_rank
from pretrain.errors import UserError
from pretrain.methods.base import Method, Run
from pretrain.methods.moco import MoCo, linear_head, mlp_head


def build_moco(cfg: CfgNode, run: Run) -> MoCo:
    """MoCo v1 or v2, as the keys of ``MOCO`` say."""
    norm = partial(SplitBatchNorm1d, groups=run.bn_groups) if cfg.MOCO.MLP_BN else None
    if norm is not None and not cfg.MOCO.MLP:
        raise UserError("MOCO.MLP_BN True needs the MLP head: set MOCO.MLP True as well.")
    head = mlp_head(cfg.MOCO.DIM, batch_norm=norm) if cfg.MOCO.MLP else linear_head(cfg.MOCO.DIM)
    build_encoder = partial(
        ResNet,
        cfg.MODEL.DEPTH,
        width=cfg.MODEL.WIDTH,
        groups=cfg.MODEL.GROUPS,
        width_per_group=cfg.MODEL.WIDTH_PER_GROUP,
        bn_groups=run.bn_groups,
        head=head,
    )
    return MoCo(
        build_encoder,
        dim=cfg.MOCO.DIM,
        queue_size=cfg.MOCO.QUEUE_SIZE,
        momentum=cfg.MOCO.MOMENTUM,
        temperature=cfg.MOCO.TEMPERATURE,
        shuffle=cfg.MOCO.SHUFFLE_BN,
        seed=cfg.SEED,
    )


METHODS: dict[str, Callable[[CfgNode, Run], Method]] = {"moco": build_moco}


def build_method(cfg: CfgNode, *, num_images: int, total_steps: int) -> Method:
    """The method that ``METHOD`` names, for this rank's share of the batch."""
    if cfg.METHOD not in METHODS:
        raise UserError(f"METHOD is '{cfg.METHOD}': choose one of {', '.join(sorted(METHODS))}.")
    world = distributed.world_size()
    groups = bn_groups_per_rank(cfg.MODEL.BN_GROUPS, cfg.SOLVER.BATCH_SIZE // world, world)
    return METHODS[cfg.METHOD](cfg, Run(num_images, total_steps, groups))

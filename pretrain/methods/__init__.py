"""The methods by name. A builder is the only place where a method meets the configuration.

What a method is stands in `pretrain.methods.base`; `docs/adding-a-method.md` shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable

from fvcore.common.config import CfgNode

from moco_common import comm
from moco_common.errors import UserError
from moco_common.text import counted
from pretrain.methods.base import Method, Run
from pretrain.methods.byol import build_byol
from pretrain.methods.end_to_end import build_end_to_end
from pretrain.methods.memory_bank import build_memory_bank
from pretrain.methods.moco import build_moco
from pretrain.methods.simclr import build_simclr
from pretrain.methods.swav import build_swav
from pretrain.modeling.batch_norm import bn_groups_per_rank
from pretrain.modeling.sync_batch_norm import synchronise_batch_norm

METHODS: dict[str, Callable[[CfgNode, Run], Method]] = {
    "moco": build_moco,
    "end-to-end": build_end_to_end,
    "memory-bank": build_memory_bank,
    "simclr": build_simclr,
    "byol": build_byol,
    "swav": build_swav,
}


def build_method(cfg: CfgNode, *, num_images: int, total_steps: int) -> Method:
    """The method that ``METHOD`` names, for this rank's share of the batch."""
    if cfg.METHOD not in METHODS:
        raise UserError(f"METHOD is '{cfg.METHOD}': choose one of {', '.join(METHODS)}.")
    world = comm.world_size()
    groups = bn_groups_per_rank(cfg.MODEL.BN_GROUPS, cfg.SOLVER.BATCH_SIZE // world, world)
    run = Run(num_images, total_steps, 1 if cfg.MODEL.SYNC_BN else groups)
    method = METHODS[cfg.METHOD](cfg, run)
    if cfg.INPUT.SMALL_CROPS and method.num_views is not None:
        raise UserError(
            f"INPUT.SMALL_CROPS is {cfg.INPUT.SMALL_CROPS}, and {cfg.METHOD} looks at no more than "
            f"{counted(method.num_views, 'view')} of an image: set it to 0, or take METHOD swav."
        )
    if cfg.MODEL.SYNC_BN:
        synchronise_batch_norm(method)
    return method

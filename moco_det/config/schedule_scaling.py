"""One schedule for any batch: what changes when the protocol's batch does not fit."""

import math
from collections.abc import Collection

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from moco_common.errors import UserError
from moco_det.config.protocols import differences

# Longest warm-up, as a part of a schedule that the user has cut short.
MAX_WARMUP_FRACTION = 0.1


def scale_schedule(
    cfg: CfgNode, reference: CfgNode, explicit: Collection[str], num_workers: int
) -> tuple[CfgNode, list[str]]:
    """Scale learning rate, length, steps and warm-up with the batch.

    Twice the batch takes twice the learning rate and half the iterations (Goyal et al. 2017,
    "ImageNet in 1 Hour"); Detectron2's ``auto_scale_workers`` does the arithmetic. It is used

    * as Detectron2 uses it, where ``SOLVER.REFERENCE_WORLD_SIZE`` is set: the config is meant for
      that many processes, and everything scales with ``num_workers``;
    * else where ``SOLVER.IMS_PER_BATCH`` differs from the reference's: everything scales with the
      batch, except the keys that the user has set and the period of the checkpoints.

    PreciseBN sees as many images as in the reference, in more or fewer batches.

    A ``MAX_ITER`` that the user has set moves ``STEPS`` along, at the same fractions, and keeps the
    warm-up within a tenth of it.

    Args:
        cfg: the config with the user's overrides applied.
        reference: the config before them.
        explicit: the keys that the user has set.
        num_workers: how many processes train.

    Returns:
        The scaled config (a copy), and one ``KEY OLD -> NEW`` for each key that was scaled here.

    Raises:
        UserError: an empty batch, or one that is no multiple of ``SOLVER.REFERENCE_WORLD_SIZE``.
    """
    scaled = cfg.clone()
    scaled.defrost()
    solver = scaled.SOLVER
    if solver.IMS_PER_BATCH < 1:
        raise UserError(f"SOLVER.IMS_PER_BATCH must be at least 1, not {solver.IMS_PER_BATCH}.")
    if solver.REFERENCE_WORLD_SIZE > 0:
        if solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be shared by "
                f"SOLVER.REFERENCE_WORLD_SIZE {solver.REFERENCE_WORLD_SIZE} processes."
            )
        scaled = DefaultTrainer.auto_scale_workers(scaled, num_workers)
    elif solver.IMS_PER_BATCH != reference.SOLVER.IMS_PER_BATCH:
        batch = solver.IMS_PER_BATCH
        solver.IMS_PER_BATCH = solver.REFERENCE_WORLD_SIZE = reference.SOLVER.IMS_PER_BATCH
        scaled = DefaultTrainer.auto_scale_workers(scaled, batch)
        scaled.SOLVER.REFERENCE_WORLD_SIZE = 0
        for key in (*explicit, "SOLVER.CHECKPOINT_PERIOD"):
            section, _, leaf = key.partition(".")
            if section in ("SOLVER", "TEST") and "." not in leaf:
                scaled[section][leaf] = cfg[section][leaf]
    solver = scaled.SOLVER
    if "SOLVER.MAX_ITER" in explicit and solver.MAX_ITER > 0:
        if "SOLVER.STEPS" not in explicit:
            stretch = solver.MAX_ITER / reference.SOLVER.MAX_ITER
            steps = {int(step * stretch) for step in reference.SOLVER.STEPS}
            solver.STEPS = tuple(sorted(s for s in steps if 0 < s < solver.MAX_ITER))
        if "SOLVER.WARMUP_ITERS" not in explicit:
            longest = round(solver.MAX_ITER * MAX_WARMUP_FRACTION)
            solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, longest)
    precise = scaled.TEST.PRECISE_BN
    if "TEST.PRECISE_BN.NUM_ITER" not in explicit:
        images = reference.TEST.PRECISE_BN.NUM_ITER * reference.SOLVER.IMS_PER_BATCH
        precise.NUM_ITER = math.ceil(images / solver.IMS_PER_BATCH)
    return scaled, differences(cfg, scaled)

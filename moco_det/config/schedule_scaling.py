"""Scaling of a protocol's schedule to a different batch size."""

import math
from collections.abc import Collection

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from moco_common.errors import UserError
from moco_det.config.protocols import differences

# Longest warm-up, as a fraction of a schedule that the user has shortened.
MAX_WARMUP_FRACTION = 0.1


def scale_schedule(
    cfg: CfgNode, reference: CfgNode, explicit: Collection[str], num_workers: int
) -> tuple[CfgNode, list[str]]:
    """Scale learning rate, length, steps and warm-up with the batch size.

    Twice the batch size means twice the learning rate and half the iterations (Goyal et al. 2017,
    "ImageNet in 1 Hour"), as computed by Detectron2's ``auto_scale_workers``:

    * If ``SOLVER.REFERENCE_WORLD_SIZE`` is set, the config is meant for that many processes, and
      everything is scaled to ``num_workers``, as in Detectron2.
    * Otherwise, if ``SOLVER.IMS_PER_BATCH`` differs from the reference, everything is scaled with
      the batch size, except the keys set by the user and the checkpoint period.

    The number of PreciseBN batches is adapted to keep its number of images.

    If the user has set ``MAX_ITER``, ``STEPS`` move to the same fractions of it, and the warm-up is
    limited to a tenth of it.

    Args:
        cfg: the config with the user's overrides applied.
        reference: the config without them.
        explicit: the keys set by the user.
        num_workers: number of training processes.

    Returns:
        The scaled config (a copy), and ``KEY OLD -> NEW`` for each key scaled here.

    Raises:
        UserError: the batch is empty, or no multiple of ``SOLVER.REFERENCE_WORLD_SIZE``.
    """
    scaled = cfg.clone()
    scaled.defrost()
    solver = scaled.SOLVER
    if solver.IMS_PER_BATCH < 1:
        raise UserError(f"SOLVER.IMS_PER_BATCH must be at least 1, not {solver.IMS_PER_BATCH}.")
    if solver.REFERENCE_WORLD_SIZE > 0:
        if solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be divided among "
                f"SOLVER.REFERENCE_WORLD_SIZE {solver.REFERENCE_WORLD_SIZE} processes: choose a "
                "multiple."
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

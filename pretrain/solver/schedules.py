"""Run lengths and learning-rate schedules, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moco_common.errors import UserError

SCHEDULES = ("step", "cosine", "exponential", "constant")


def total_steps(images: int, *, batch_size: int, epochs: float, max_iter: int) -> int:
    """Return the number of steps of a run limited by epochs, iterations or both (0: no limit).

    Raises:
        UserError: both limits are 0, or one is negative.
    """
    if epochs < 0 or max_iter < 0 or not (epochs or max_iter):
        raise UserError(
            f"SOLVER.EPOCHS is {epochs} and SOLVER.MAX_ITER {max_iter}: set one of them above 0 "
            f"(and neither below 0) to give the run a length."
        )
    by_epochs = math.ceil(epochs * images / batch_size)
    return min(by_epochs or max_iter, max_iter or by_epochs)


def warmup_steps(images: int, *, batch_size: int, iterations: int, epochs: float) -> int:
    """Return the number of steps of a warm-up given in iterations or in epochs.

    Raises:
        UserError: both are given, or one is negative.
    """
    if min(iterations, epochs) < 0 or (iterations and epochs):
        raise UserError(
            f"SOLVER.WARMUP_ITERS is {iterations} and SOLVER.WARMUP_EPOCHS {epochs:g}: set one of "
            f"them to 0 and the other to the length of the warm-up."
        )
    return iterations or math.ceil(epochs * images / batch_size)


def learning_rate(
    step: int,
    total: int,
    *,
    base: float,
    schedule: str,
    warmup: int = 0,
    milestones: Sequence[float] = (0.6, 0.8),
    gamma: float = 0.1,
    decay_period: int = 0,
    end: float = 0.0,
) -> float:
    """Return the learning rate of a step in [0, total).

    1. ``step < warmup``: linear from base/warmup to base.
    2. ``step``: base, multiplied by gamma at each milestone. Milestones are shares of the run
       (MoCo v1: epochs 120 and 160 of 200).
    3. ``cosine``: half a cosine over the rest of the run, from base to ``end`` times base
       (``end`` is 0 in MoCo v2 and 0.001 in SwAV).
    4. ``exponential``: base, multiplied by gamma every ``decay_period`` steps (MoCo on
       Instagram-1B: by 0.9 every 62,500 steps).
    5. ``constant``: base.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "step":
        return base * gamma ** sum(step >= share * total for share in milestones)
    if schedule == "cosine":
        if not 0 <= end <= 1:
            raise UserError(
                f"SOLVER.END_SHARE is {end:g}: give a share of SOLVER.BASE_LR, from 0 to 1."
            )
        half = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        return base * (end + (1.0 - end) * half)
    if schedule == "exponential":
        if decay_period < 1:
            raise UserError(
                f"SOLVER.DECAY_PERIOD is {decay_period}: with SOLVER.SCHEDULE exponential, set it "
                f"to the number of iterations between two decays, such as 62500."
            )
        return base * gamma ** (step // decay_period)
    if schedule == "constant":
        return base
    raise UserError(f"SOLVER.SCHEDULE is '{schedule}': choose one of {', '.join(SCHEDULES)}.")

"""The length of a run, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moco_common.errors import UserError

SCHEDULES = ("step", "cosine", "exponential", "constant")


def total_steps(images: int, *, batch_size: int, epochs: float, max_iter: int) -> int:
    """Steps of a run of so many epochs or so many iterations, whichever ends first; 0 leaves the
    other alone to say.

    Raises:
        UserError: both are 0, or one is negative.
    """
    if epochs < 0 or max_iter < 0 or not (epochs or max_iter):
        raise UserError(
            f"SOLVER.EPOCHS is {epochs} and SOLVER.MAX_ITER {max_iter}: one must be above 0, and "
            f"says how long the run is."
        )
    by_epochs = math.ceil(epochs * images / batch_size)
    return min(by_epochs or max_iter, max_iter or by_epochs)


def warmup_steps(images: int, *, batch_size: int, iterations: int, epochs: float) -> int:
    """Steps of a warm-up that is told in iterations or in epochs.

    Raises:
        UserError: it is told in both, or one is negative.
    """
    if min(iterations, epochs) < 0 or (iterations and epochs):
        raise UserError(
            f"SOLVER.WARMUP_ITERS is {iterations} and SOLVER.WARMUP_EPOCHS {epochs:g}: one must be "
            f"0, and the other the length of the warm-up."
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
    """Learning rate of a step in [0, total).

    1. ``step < warmup``: linear from base/warmup to base.
    2. ``step``: times gamma at each milestone passed, milestones as shares of the run
       (MoCo v1: epochs 120 and 160 of 200).
    3. ``cosine``: half a cosine over the rest of the run, from base to the share ``end`` of it
       (MoCo v2: 0; SwAV: 0.001).
    4. ``exponential``: times gamma after every ``decay_period`` steps (MoCo on Instagram-1B: 0.9
       after every 62,500).
    5. ``constant``: base.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "step":
        return base * gamma ** sum(step >= share * total for share in milestones)
    if schedule == "cosine":
        if not 0 <= end <= 1:
            raise UserError(
                f"SOLVER.END_SHARE is {end:g}: it is a share of SOLVER.BASE_LR, 0 to 1."
            )
        half = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        return base * (end + (1.0 - end) * half)
    if schedule == "exponential":
        if decay_period < 1:
            raise UserError(
                f"SOLVER.DECAY_PERIOD is {decay_period}: SOLVER.SCHEDULE exponential needs the "
                f"iterations between two decays, such as 62500."
            )
        return base * gamma ** (step // decay_period)
    if schedule == "constant":
        return base
    raise UserError(f"SOLVER.SCHEDULE is '{schedule}': choose one of {', '.join(SCHEDULES)}.")

"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pretrain.errors import UserError

SCHEDULES = ("step", "cosine", "constant")


def learning_rate(
    step: int,
    total: int,
    *,
    base: float,
    schedule: str,
    warmup: int = 0,
    milestones: Sequence[float] = (0.6, 0.8),
    gamma: float = 0.1,
) -> float:
    """Learning rate of a step in [0, total).

    1. ``step < warmup``: linear from base/warmup to base.
    2. ``step``: times gamma at each milestone passed, milestones as shares of the run
       (MoCo v1: epochs 120 and 160 of 200).
    3. ``cosine``: half a cosine from base to 0 over the rest of the run (MoCo v2).
    4. ``constant``: base.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "step":
        return base * gamma ** sum(step >= share * total for share in milestones)
    if schedule == "cosine":
        return base * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if schedule == "constant":
        return base
    raise UserError(f"SOLVER.SCHEDULE is '{schedule}': choose one of {', '.join(SCHEDULES)}.")

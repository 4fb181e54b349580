"""Timing of calls that take turns, so that noise on the machine affects all of them alike."""

import time
from collections.abc import Callable, Mapping


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each call in milliseconds by ``clock``, one value per round, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name, call in calls.items():
            start = clock()
            call()
            if number >= 0:
                times[name].append((clock() - start) * 1e3)
    return times

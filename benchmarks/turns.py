"""Timing of things that take turns, so that a noisy machine is noisy for all of them."""

import time
from collections.abc import Callable, Mapping


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each call, one value a round, by the given clock; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name, call in calls.items():
            start = clock()
            call()
            if number >= 0:
                times[name].append((clock() - start) * 1e3)
    return times

"""Numbers and durations as text."""

from __future__ import annotations


def counted(number: float, noun: str, spec: str = "") -> str:
    """Format a count: ``1 image``, ``2 images``, ``3 classes``; ``spec`` formats the number."""
    ending = "es" if noun.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{number:{spec}} {noun}{'' if number == 1 else ending}"


def duration(seconds: float) -> str:
    """Format seconds as ``h:mm:ss``, such as ``0:03:10`` or ``51:04:05``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

"""Numbers and durations as text."""

from __future__ import annotations

import datetime


def counted(number: float, noun: str, spec: str = "") -> str:
    """``1 image``, ``2 images``, ``3 classes``; ``spec`` formats the number (",": 1,000)."""
    ending = "es" if noun.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{number:{spec}} {noun}{'' if number == 1 else ending}"


def duration(seconds: float) -> str:
    """``"0:03:10"``."""
    return str(datetime.timedelta(seconds=round(seconds)))

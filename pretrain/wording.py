"""Numbers beside their nouns."""

from __future__ import annotations


def counted(number: float, noun: str, spec: str = "") -> str:
    """``1 image``, ``2 images``, ``3 classes``; ``spec`` formats the number (",": 1,000).

    (`moco_det.wording` has the same: the packages share no code.)
    """
    ending = "es" if noun.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{number:{spec}} {noun}{'' if number == 1 else ending}"

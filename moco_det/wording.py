"""Numbers beside their nouns."""


def counted(number: float, noun: str, spec: str = "") -> str:
    """``1 image``, ``2 images``, ``3 classes``; ``spec`` formats the number (",": 1,000).

    (`pretrain.wording` has the same: the packages share no code.)
    """
    ending = "es" if noun.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{number:{spec}} {noun}{'' if number == 1 else ending}"

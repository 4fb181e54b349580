"""Weights that have grown during pre-training: from which factor on it matters, and the remedy."""

from __future__ import annotations

GROWN = 5.0  # times the norm of a fresh layer: its direction turns 1 / 25 as far in fine-tuning


def growth_warning(layer: str, factor: float, remedy: str) -> str | None:
    """One sentence about the layer that has grown the most; None if it has not grown much.

    Args:
        factor: norm of its weights over the norm of a fresh layer.
        remedy: what to do about it, a clause.
    """
    if factor < GROWN:
        return None
    return (
        f"{layer} has grown to {factor:.0f} times the norm of a fresh layer: BN hides it from the "
        f"loss, and fine-tuning hardly moves such a layer; {remedy}"
    )

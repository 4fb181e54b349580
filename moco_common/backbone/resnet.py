"""Facts about ResNets that both packages need: depths, and growth of weights in pre-training."""

from __future__ import annotations

# Blocks per stage by depth (He et al. 2016, arXiv:1512.03385, Table 1).
BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# Ratio to the norm of a fresh layer from which on weights have grown too much: the direction of a
# layer that has grown five times turns 1 / 25 as far in fine-tuning.
GROWN = 5.0


def has_bottlenecks(depth: int) -> bool:
    """Return True for bottlenecks (three convolutions), False for basic blocks (two)."""
    return depth >= 50


def depth_of(blocks: tuple[int, ...], bottlenecks: bool) -> int | None:
    """Return the depth of the ResNet with these numbers of blocks; None if there is none."""
    for depth, known in BLOCKS_PER_STAGE.items():
        if known == blocks and has_bottlenecks(depth) == bottlenecks:
            return depth
    return None


def growth_warning(layer: str, factor: float, remedy: str) -> str | None:
    """Return a warning about the layer that has grown most; None if it has not grown much.

    Args:
        factor: ratio of the norm of its weights to the norm of a fresh layer.
        remedy: what to do about it, a clause.
    """
    if factor < GROWN:
        return None
    return (
        f"{layer} has grown to {factor:.0f} times the norm of a fresh layer: BN hides it from the "
        f"loss, and fine-tuning hardly moves such a layer; {remedy}"
    )

"""The ResNets of He et al. 2016 (arXiv:1512.03385, table 1) by depth."""

from __future__ import annotations

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def has_bottlenecks(depth: int) -> bool:
    """Whether the blocks are bottlenecks of three convolutions, not basic blocks of two."""
    return depth >= 50


def depth_of(blocks: tuple[int, ...], bottlenecks: bool) -> int | None:
    """The depth of the ResNet with these numbers of blocks; None if there is none."""
    for depth, known in BLOCKS_PER_STAGE.items():
        if known == blocks and has_bottlenecks(depth) == bottlenecks:
            return depth
    return None

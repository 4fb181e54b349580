"""Colours of classes, and pixels tinted with them."""

import colorsys
from functools import lru_cache

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

# Distinguishable with colour-blindness (Okabe and Ito, "Color Universal Design", 2008, without
# black), followed by lighter and darker colours for further classes.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
          "#B2DF8A", "#CAB2D6", "#FB9A99", "#A6761D", "#17BECF")  # fmt: skip


@lru_cache
def palette(count: int) -> NDArray[np.uint8]:
    """(count, 3) RGB: `COLORS`, then further hues a golden angle apart."""
    colors = [to_rgb(code) for code in COLORS[:count]]
    for index in range(count - len(colors)):
        colors.append(colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), 0.95))
    return np.round(255 * np.array(colors)).astype(np.uint8).reshape(-1, 3)


def tint(
    image: NDArray[np.uint8], mask: NDArray[np.bool_], color: NDArray[np.uint8], opacity: float
) -> None:
    """Blend a colour into the pixels (H, W, 3) of a mask (H, W), in place."""
    image[mask] = np.round((1 - opacity) * image[mask] + opacity * color).astype(np.uint8)

"""Matplotlib figures without a display: panels in rows, literal text, atomic writes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from moco_common.files import replace_file

FIRST_CJK = 0x2E80
DPI = 100  # of figures composed from pictures
_OPTIONS: dict[str, dict[str, Any]] = {  # by suffix
    ".png": {},
    ".jpg": {"pil_kwargs": {"quality": 88}},
    ".svg": {"metadata": {"Date": None}},
}


def panels(
    count: int, columns: int, size: tuple[float, float], margin: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, in rows of at most ``columns``.

    Args:
        count: number of axes.
        columns: largest number of axes per row.
        size: width and height of a panel in inches.
        margin: additional height in inches, for a legend and a footnote.
        options: passed to ``Figure.subplots``.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure((size[0] * columns, size[1] * rows + margin), dpi=110, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axis in axes[:count]:
        frame(axis)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def frame(axis: Axes) -> None:
    """Draw a light grid, and an axis line only on the left and at the bottom."""
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def name_lines(figure: Figure, lines: Mapping[str, Line2D]) -> None:
    """Add a legend above the panels."""
    figure.legend(
        list(lines.values()),
        list(map(literal, lines)),
        loc="outside upper center",
        ncols=4,
        frameon=False,
    )


def chance_line(axis: Axes, level: float) -> None:
    """Mark the loss of an encoder that has learned nothing by a dashed line with its value."""
    axis.axhline(level, color="0.3", linewidth=1, linestyle="--")
    axis.annotate(
        f"chance {level:.2f}",
        (1, level),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color="0.3",
    )


@cache
def fonts() -> list[str]:
    """Matplotlib's own font and, if one is installed, a font with Chinese characters."""
    for font in fontManager.ttflist:
        if get_font(font.fname).get_char_index(ord("中")):
            return ["DejaVu Sans", font.name]
    return ["DejaVu Sans"]


@cache
def _warn_of_squares() -> None:
    print(
        "warning: no installed font has Chinese, Japanese and Korean characters, which are drawn "
        "as squares: install one, such as Noto Sans CJK",
        file=sys.stderr,
    )


def literal(text: str) -> str:
    """Escape `$`, which matplotlib would otherwise take for the start of a formula."""
    if any(ord(sign) >= FIRST_CJK for sign in text) and len(fonts()) == 1:
        _warn_of_squares()
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG or, by the suffix, JPEG or SVG; atomically."""
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_fontfamily(fonts())
    suffix = Path(path).suffix if Path(path).suffix in _OPTIONS else ".png"
    return replace_file(
        path, lambda file: figure.savefig(file, format=suffix[1:], **_OPTIONS[suffix])
    )


def save_pixels(pixels: NDArray[np.uint8], path: str | Path) -> Path:
    """Write an RGB image (H, W, 3) as PNG; atomically."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return replace_file(path, lambda file: image.save(file, format="PNG"))

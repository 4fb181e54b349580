"""Pictures and figures: literal text, atomic writes."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from moco_common.files import replace_file

FIRST_CJK = 0x2E80
DPI = 100  # of figures composed from pictures


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
    """Write a figure as PNG or, by the suffix, JPEG; atomically."""
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_fontfamily(fonts())
    jpeg = Path(path).suffix == ".jpg"
    options = {"format": "jpg", "pil_kwargs": {"quality": 88}} if jpeg else {"format": "png"}
    return replace_file(path, lambda file: figure.savefig(file, **options))


def save_pixels(pixels: NDArray[np.uint8], path: str | Path) -> Path:
    """Write an RGB image (H, W, 3) as PNG; atomically."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return replace_file(path, lambda file: image.save(file, format="PNG"))

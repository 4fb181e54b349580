"""Pictures and figures: literal text, atomic writes."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from moco_common.files import replace_file

DPI = 100  # of figures composed from pictures


def literal(text: str) -> str:
    """Escape `$`, which matplotlib would otherwise take for the start of a formula."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG or, by the suffix, JPEG; atomically."""
    FigureCanvasAgg(figure)
    jpeg = Path(path).suffix == ".jpg"
    options = {"format": "jpg", "pil_kwargs": {"quality": 88}} if jpeg else {"format": "png"}
    return replace_file(path, lambda file: figure.savefig(file, **options))


def save_pixels(pixels: NDArray[np.uint8], path: str | Path) -> Path:
    """Write an RGB image (H, W, 3) as PNG; atomically."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return replace_file(path, lambda file: image.save(file, format="PNG"))

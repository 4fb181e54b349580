"""Figures written atomically."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moco_common.files import replace_file


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG or, by the path's suffix, JPEG; whole or not at all."""
    FigureCanvasAgg(figure)
    jpeg = Path(path).suffix == ".jpg"
    options = {"format": "jpg", "pil_kwargs": {"quality": 88}} if jpeg else {"format": "png"}
    return replace_file(path, lambda file: figure.savefig(file, **options))

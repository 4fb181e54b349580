"""Detectron2's visualizer, adapted to detections that are right or wrong."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.utils.visualizer import VisImage, Visualizer
from numpy.typing import NDArray

from moco_common.figures import fonts, literal

LineStyle = tuple[float, Sequence[float]]
SOLID: LineStyle = (0, ())
DASHED: LineStyle = (0, (3, 2))
DOTTED: LineStyle = (0, (1, 1))


def lighter(color: NDArray[np.uint8]) -> NDArray[np.floating]:
    """The colour of text on black for a class of an RGB colour: (3,) in [0, 1]."""
    return (color / 255 + 1) / 2


class ObjectVisualizer(Visualizer):
    """Draw opaque boxes in `line_style`, and text literally and inside the image.

    For images at their own size only (`scale` 1).
    """

    line_style = SOLID

    def draw_box(
        self,
        box_coord: Sequence[float],
        alpha: float = 1.0,
        edge_color: Any = "g",
        line_style: Any = None,
    ) -> VisImage:
        return super().draw_box(box_coord, alpha, edge_color, line_style or self.line_style)

    def pixels(self) -> NDArray[np.uint8]:
        """The drawing, RGB (H, W, 3)."""
        drawn: NDArray[np.uint8] = self.output.get_image()
        return drawn

    def draw_text(self, text: str, position: Sequence[float], **options: Any) -> VisImage:
        output = super().draw_text(literal(text), position, **options)
        drawn = output.ax.texts[-1]
        drawn.set_fontfamily(fonts())
        extent = drawn.get_window_extent()  # pixels; y runs up
        x, y = drawn.get_position()
        right = max(0.0, extent.x1 + 2 - output.width)
        below = max(0.0, 2 - extent.y0)
        drawn.set_position((max(x - right, 0.0), max(y - below, 0.0)))
        return output

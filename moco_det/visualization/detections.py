"""Detections drawn on images: one model's, or several beside the ground truth."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from moco_det.structures.objects import Objects
from moco_det.visualization.figure import save_figure

# Colours that stay apart for the colour-blind (Okabe and Ito, "Color Universal Design", 2008,
# without black), then lighter and darker ones for further classes.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
          "#B2DF8A", "#CAB2D6", "#FB9A99", "#A6761D", "#17BECF")  # fmt: skip
CELL = 320  # pixels of an image's long side in a grid
DPI = 100
MOST_LABELS = 20  # on a picture of CELL x CELL pixels
SOLID: tuple[float, Sequence[float]] = (0, ())
DASHED: tuple[float, Sequence[float]] = (0, (3, 2))
DOTTED: tuple[float, Sequence[float]] = (0, (1, 1))


def draw_objects(
    axes: Axes,
    image: NDArray[np.uint8],
    objects: Objects,
    class_names: Sequence[str],
    right: NDArray[np.bool_] | None = None,
    size: tuple[int, int] | None = None,
    with_names: bool = True,
) -> None:
    """Draw an RGB image (H, W, 3), shown at `size` (width, height), with its objects.

    Boxes and masks have their class's colour and carry its name (`with_names`) and the score;
    wrong ones (`right` is False) are dashed, ignored annotations dotted. In a crowd, more than
    20 objects on a picture of 320 x 320 pixels, there are no labels.
    """
    height, width = image.shape[:2]
    size = size or (width, height)
    enlarged = size[0] >= width
    method = cv2.INTER_CUBIC if enlarged else cv2.INTER_AREA
    canvas = np.asarray(cv2.resize(image, size, interpolation=method), dtype=np.uint8)
    scale = np.array([size[0] / width, size[1] / height] * 2)
    if objects.masks is not None:
        for mask, category in zip(objects.masks, objects.classes, strict=True):
            _blend_mask(canvas, mask, _rgb(category))
    axes.imshow(canvas, extent=(0, size[0], size[1], 0), interpolation="nearest")
    axes.set_axis_off()
    crowded = len(objects) * CELL**2 > MOST_LABELS * size[0] * size[1]
    # Large ones first, so that what lies within them stays visible.
    for index in np.lexsort((objects.scores_or_zero(), -objects.areas())):
        x0, y0, x1, y1 = objects.boxes[index] * scale
        color = COLORS[int(objects.classes[index]) % len(COLORS)]
        style = SOLID if right is None or right[index] else DASHED
        if objects.ignored is not None and objects.ignored[index]:
            style = DOTTED
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color)
        box.set_linewidth(1.2 if crowded else 1.8)
        box.set_linestyle(style)
        box.set_path_effects([withStroke(linewidth=2.2 if crowded else 3, foreground="#0008")])
        axes.add_patch(box)
        parts = [str(class_names[int(objects.classes[index])])] if with_names else []
        parts += [f"{objects.scores[index]:.2f}"] if objects.scores is not None else []
        if crowded or not parts:  # labels over labels would only hide the picture
            continue
        at_the_edge = x0 > 0.75 * size[0]
        axes.text(
            min(x1, size[0]) if at_the_edge else max(x0, 0),
            max(y0, 11),
            " ".join(parts),
            fontsize=6.5,
            ha="right" if at_the_edge else "left",
            va="bottom",
            clip_on=True,
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )
    axes.set_xlim(0, size[0])
    axes.set_ylim(size[1], 0)


def save_picture(
    image: NDArray[np.uint8], objects: Objects, class_names: Sequence[str], path: str | Path
) -> Path:
    """Write one RGB image with its objects as PNG, at its own size (small ones enlarged)."""
    height, width = image.shape[:2]
    scale = max(1.0, CELL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    dpi = DPI * max(1.0, max(size) / 800)  # lines and letters grow with a large image
    figure = Figure(figsize=(size[0] / dpi, size[1] / dpi), dpi=dpi)
    draw_objects(figure.add_axes((0, 0, 1, 1)), image, objects, class_names, size=size)
    return save_figure(figure, path)


def _blend_mask(
    canvas: NDArray[np.uint8], mask: NDArray[np.bool_], color: NDArray[np.int_]
) -> None:
    """Tint a mask's pixels and draw its outline, in place."""
    size = (canvas.shape[1], canvas.shape[0])
    inside = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5
    canvas[inside] = (0.6 * canvas[inside] + 0.4 * color).astype(np.uint8)
    outlines, _ = cv2.findContours(
        inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    cv2.drawContours(canvas, outlines, -1, color.tolist(), 1)


def _rgb(category: int) -> NDArray[np.int_]:
    code = COLORS[int(category) % len(COLORS)]
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)])

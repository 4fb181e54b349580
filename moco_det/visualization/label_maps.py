"""The class of every pixel: what a semantic segmentation model found, drawn and written."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from moco_common.files import replace_file
from moco_det.structures.label_map import UNLABELLED, LabelMap
from moco_det.visualization.detections import CELL, COLORS, DPI
from moco_det.visualization.figure import save_figure

MOST_IN_LEGEND = 20
BACKGROUND = ("background", "__background__", "_background_")
OPACITY = 0.55
ENTRY = 150  # pixels of an entry of the legend
LINE = 18  # of a line of it


def palette(count: int) -> NDArray[np.uint8]:
    """(count, 3) RGB colours: those of the boxes, then further hues a golden angle apart."""
    colors = [[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in COLORS[:count]]
    for index in range(count - len(colors)):
        rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), 0.95)
        colors.append([round(255 * value) for value in rgb])
    return np.array(colors, dtype=np.uint8).reshape(-1, 3)


def blend_labels(
    image: NDArray[np.uint8], found: LabelMap, class_names: Sequence[str]
) -> NDArray[np.uint8]:
    """A copy of an RGB image (H, W, 3), tinted by class; background and what has no label is not,
    and a dark line parts the classes."""
    colors = palette(len(class_names)).astype(np.float32)
    tinted = [c for c in found.shares() if class_names[c].lower() not in BACKGROUND]
    inside = np.isin(found.classes, tinted)
    canvas = image.copy()
    mixed = (1 - OPACITY) * image[inside] + OPACITY * colors[found.classes[inside]]
    canvas[inside] = mixed.astype(np.uint8)
    edges = cv2.morphologyEx(found.classes, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0
    canvas[edges] //= 3
    return canvas


def save_label_picture(
    image: NDArray[np.uint8], found: LabelMap, class_names: Sequence[str], path: str | Path
) -> Path:
    """Write one RGB image with its classes tinted, and what the colours mean below it, as PNG."""
    height, width = image.shape[:2]
    scale = max(1.0, CELL / max(height, width))
    shown, tall = max(1, round(width * scale)), max(1, round(height * scale))
    grown = max(1.0, max(shown, tall) / 800)  # the letters grow with a large image
    entries = list(found.shares().items())[:MOST_IN_LEGEND]
    columns = max(1, int(shown / (ENTRY * grown)))
    foot = round(grown * (LINE * -(-len(entries) // columns) + 8)) if entries else 0
    across, dpi = max(shown, ENTRY if entries else 1), DPI * grown
    figure = Figure(figsize=(across / dpi, (tall + foot) / dpi), dpi=dpi, facecolor="white")
    place = ((across - shown) / 2 / across, foot / (tall + foot), shown / across)
    axes = figure.add_axes((*place, tall / (tall + foot)))
    axes.imshow(
        blend_labels(image, found, class_names),
        extent=(0, shown, tall, 0),
        interpolation="nearest" if scale > 1 else "antialiased",
    )
    axes.set_axis_off()
    colors = palette(len(class_names)) / 255
    handles = [Patch(facecolor=colors[c], edgecolor="0.3") for c, _ in entries]
    labels = [f"{_short(class_names[c])} {100 * share:.1f} %" for c, share in entries]
    if entries:
        figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=7,
                      frameon=False, borderpad=0.2, handlelength=1.2, labelspacing=0.35,
                      columnspacing=1.0)  # fmt: skip
    return save_figure(figure, path)


def draw_labels_on_frame(
    frame: NDArray[np.uint8], found: LabelMap, class_names: Sequence[str]
) -> NDArray[np.uint8]:
    """A copy of an RGB frame with its classes tinted and named: quicker than a figure."""
    canvas = blend_labels(frame, found, class_names)
    colors = palette(len(class_names))
    scale = max(0.4, max(frame.shape[:2]) / 1600)
    step = round(40 * scale)
    for line, category in enumerate(list(found.shares())[: frame.shape[0] // step]):
        top = line * step
        color = colors[category].tolist()
        cv2.rectangle(canvas, (0, top), (step, top + step), color, -1)
        for shade, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(
                canvas, class_names[category], (step + 4, top + round(0.75 * step)),
                cv2.FONT_HERSHEY_SIMPLEX, scale, shade, width, cv2.LINE_AA,
            )  # fmt: skip
    return canvas


def save_labels(found: LabelMap, num_classes: int, path: str | Path) -> Path:
    """Write a PNG of class indices, of the image's size, with the picture's colours as palette.

    It is what `semseg:IMAGES:LABELS` reads.
    """
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[:num_classes] = palette(num_classes)
    colors[UNLABELLED] = 255
    image = Image.fromarray(found.classes)
    image.putpalette(colors.reshape(-1).tobytes())
    return replace_file(path, lambda file: image.save(file, format="PNG"))


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"

"""Label maps of semantic segmentation: drawn on an image, and written as files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from moco_common.figures import DPI, literal, save_figure
from moco_common.files import replace_file
from moco_det.structures.label_map import UNLABELLED, LabelMap
from moco_det.visualization.detections import CELL
from moco_det.visualization.palette import palette, tint
from moco_det.visualization.visualizer import ObjectVisualizer, lighter

MOST_IN_LEGEND = 20
BACKGROUND = ("background", "__background__", "_background_")
OPACITY = 0.55
LEAST_NAMED = 0.005  # share of the pixels; the name would hide a smaller area
ALSO_NAMED = 120_000  # pixels of one area
ENTRY, LINE = 150, 18  # pixels: width of an entry of the legend, height of a line


def draw_labels(
    image: NDArray[np.uint8], found: LabelMap, class_names: Sequence[str]
) -> NDArray[np.uint8]:
    """Tint and name the classes on a copy of an RGB image (H, W, 3).

    Background and unlabelled pixels remain as they are.
    """
    colors = palette(len(class_names))
    names = {c: class_names[c] for c in found.shares() if class_names[c].lower() not in BACKGROUND}
    drawn = image.copy()
    for category in names:
        tint(drawn, found.classes == category, colors[category], OPACITY)
    visualizer = ObjectVisualizer(drawn)
    for category, name in names.items():
        for x, y in _places(found.classes == category):
            visualizer.draw_text(name, (x, y), color=lighter(colors[category]))
    return visualizer.pixels()


def _places(mask: NDArray[np.bool_]) -> Iterator[tuple[float, float]]:
    """Yield where to name a class: the median x and y of its largest area, and of others as large
    as `ALSO_NAMED`; none if it covers little of the image."""
    if mask.mean() <= LEAST_NAMED:
        return
    _, areas, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    sizes = boxes[1:, cv2.CC_STAT_AREA]
    for index in np.flatnonzero((sizes == sizes.max()) | (sizes > ALSO_NAMED)) + 1:
        left, top, width, height = boxes[index, :4]
        inside = areas[top : top + height, left : left + width] == index
        rows, columns = inside.sum(axis=1).cumsum(), inside.sum(axis=0).cumsum()
        yield (
            left + float(np.searchsorted(columns, columns[-1] / 2)),
            top + float(np.searchsorted(rows, rows[-1] / 2)),
        )


def save_label_picture(
    image: NDArray[np.uint8], found: LabelMap, class_names: Sequence[str], path: str | Path
) -> Path:
    """Write an RGB image with its classes, above a legend with each class's share, as PNG."""
    scale = max(1.0, CELL / max(image.shape[:2]))
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    enlarged = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    classes = cv2.resize(found.classes, size, interpolation=cv2.INTER_NEAREST).astype(np.uint8)
    drawn = draw_labels(enlarged, LabelMap(classes, found.scores), class_names)

    grown = max(1.0, max(size) / 800)  # text grows with a large image
    entries = list(found.shares().items())[:MOST_IN_LEGEND]
    columns = max(1, int(size[0] / (ENTRY * grown)))
    foot = round(grown * (LINE * -(-len(entries) // columns) + 8)) if entries else 0
    across = max(size[0], ENTRY) if entries else size[0]
    sheet = np.full((size[1] + foot, across, 3), 255, np.uint8)
    left = (across - size[0]) // 2
    sheet[: size[1], left : left + size[0]] = drawn
    dpi = DPI * grown
    figure = Figure(figsize=(across / dpi, len(sheet) / dpi), dpi=dpi)
    figure.figimage(sheet)
    colors = palette(len(class_names)) / 255
    handles = [Patch(facecolor=colors[c], edgecolor="0.3") for c, _ in entries]
    labels = [f"{_short(class_names[c])} {100 * share:.1f} %" for c, share in entries]
    if entries:
        figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=7,
                      frameon=False, borderpad=0.2, handlelength=1.2, labelspacing=0.35,
                      columnspacing=1.0)  # fmt: skip
    return save_figure(figure, path)


def save_labels(found: LabelMap, num_classes: int, path: str | Path) -> Path:
    """Write class indices as a PNG of the image's size, with the picture's colours as palette.

    Such files are read by `semseg:IMAGES:LABELS`.
    """
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[:num_classes] = palette(num_classes)
    colors[UNLABELLED] = 255
    image = Image.fromarray(found.classes)
    image.putpalette(colors.reshape(-1).tobytes())
    return replace_file(path, lambda file: image.save(file, format="PNG"))


def _short(name: str, most: int = 16) -> str:
    return literal(name if len(name) <= most else name[: most - 1] + "…")

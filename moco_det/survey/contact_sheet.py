"""A contact sheet: images of a data set with their boxes and masks, or with their label maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from moco_common.errors import UserError
from moco_common.figures import DPI, fonts, literal
from moco_common.images import DecodeError, read_picture, save_contact_sheet
from moco_det.data.datasets.label_files import read_labels
from moco_det.report.predictions_io import annotated_objects
from moco_det.structures.label_map import LabelMap
from moco_det.visualization.detections import CELL, draw_objects, resize
from moco_det.visualization.label_maps import draw_labels
from moco_det.visualization.palette import palette

COLUMNS, GAP, CAPTION = 4, 8, 16  # cells in a row; pixels
MOST_IN_LEGEND = 24


def draw_sheet(
    records: Sequence[Mapping[str, Any]], classes: Sequence[str], path: Path, count: int
) -> int:
    """Write the sheet as JPEG or PNG, by the suffix.

    Returns:
        The number of images on it: up to ``count``, without those that cannot be read.

    Raises:
        UserError: none can be read.
    """
    cells, names = [], []
    for record in choose_images(records, count):
        try:
            cells.append(_cell(record, classes))
        except (OSError, DecodeError):
            continue
        names.append(Path(record["file_name"]).name)
    if not cells:
        raise UserError("no contact sheet: none of the images can be read")
    shown = sorted({i["category_id"] for r in records for i in r.get("annotations", ())})
    if records and "sem_seg_file_name" in records[0]:
        shown = list(range(len(classes)))
    save_contact_sheet(_compose(cells, names, classes, shown), path)
    return len(cells)


def choose_images(records: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Choose images that show each class, the rarest first, and then evenly spaced ones; in the
    data set's order."""
    classes = [{i["category_id"] for i in record.get("annotations", ())} for record in records]
    frequency = Counter(category for found in classes for category in found)
    chosen: dict[int, None] = {}
    for category, _ in reversed(frequency.most_common()):
        if len(chosen) < count and not any(category in classes[index] for index in chosen):
            chosen[next(at for at, found in enumerate(classes) if category in found)] = None
    with_objects = [at for at, found in enumerate(classes) if found] or list(range(len(records)))
    for at in np.linspace(0, len(with_objects) - 1, min(count, len(with_objects))).round():
        chosen.setdefault(with_objects[int(at)])
    return [records[at] for at in sorted(list(chosen)[:count])]


def _cell(record: Mapping[str, Any], classes: Sequence[str]) -> NDArray[np.uint8]:
    image = read_picture(record["file_name"])
    if "sem_seg_file_name" in record:
        labels = read_labels(record["sem_seg_file_name"]).astype(np.uint8)
        scale = CELL / max(labels.shape)
        width, height = (max(1, round(side * scale)) for side in labels.shape[::-1])
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        found = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
        label_map = LabelMap(found.astype(np.uint8), np.ones(found.shape, np.float32))
        return draw_labels(small.astype(np.uint8), label_map, classes)
    image, objects = resize(image, annotated_objects(record, masks=True), CELL)
    return draw_objects(image, objects, classes, with_names=len(classes) > 1)


def _compose(
    cells: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    classes: Sequence[str],
    shown: Sequence[int],
) -> NDArray[np.uint8]:
    """Place the cells, each above its name, and a legend of the classes."""
    columns = min(COLUMNS, len(cells))
    rows = [range(at, min(at + columns, len(cells))) for at in range(0, len(cells), columns)]
    heights = [max(len(cells[index]) for index in row) + CAPTION for row in rows]
    across = columns * (CELL + GAP) + GAP
    entries = shown[:MOST_IN_LEGEND]
    per_line = max(1, across // 160)
    foot = 18 * -(-len(entries) // per_line) + 12 if entries else 0
    down = sum(heights) + GAP * (len(rows) + 1) + foot
    sheet = np.full((down, across, 3), 255, np.uint8)
    figure = Figure(figsize=(across / DPI, down / DPI), dpi=DPI)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            cell, left = cells[index], GAP + column * (CELL + GAP)
            sheet[top : top + len(cell), left : left + cell.shape[1]] = cell
            name = names[index] if len(names[index]) <= 44 else f"…{names[index][-43:]}"
            figure.text(left / across, 1 - (top + len(cell) + CAPTION - 3) / down, literal(name),
                        fontsize=7, color="0.3", fontfamily=fonts())  # fmt: skip
        top += height + GAP
    figure.figimage(sheet)
    if entries:
        colors = palette(len(classes)) / 255
        handles = [Line2D([], [], color=colors[index], linewidth=4) for index in entries]
        labels = [literal(str(classes[index])[:24]) for index in entries]
        figure.legend(handles, labels, loc="lower center", ncols=per_line, frameon=False,
                      handlelength=2, prop={"family": fonts(), "size": 7.5})  # fmt: skip
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]

"""Example images of a report: ground truth and detections of several runs side by side."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from moco_common.errors import UserError
from moco_common.figures import DPI, literal, save_figure
from moco_common.images import read_picture
from moco_det.report.error_analysis import best_threshold, match
from moco_det.report.predictions_io import (
    OpenDataset,
    annotated_objects,
    detected_objects,
    open_dataset,
    read_predictions,
)
from moco_det.report.runs import read_run
from moco_det.structures.objects import Objects
from moco_det.visualization.detections import CELL, draw_objects, resize
from moco_det.visualization.palette import palette
from moco_det.visualization.visualizer import DASHED, SOLID


def detections_grid(
    images: Sequence[NDArray[np.uint8]],
    truth: Sequence[Objects],
    detections: Mapping[str, Sequence[Objects]],
    class_names: Sequence[str],
    path: str | Path,
    row_names: Sequence[str] | None = None,
) -> Path:
    """Write a grid as PNG or JPEG: one row per image; the ground truth, then a column per model.

    Right detections (IoU of at least 0.5 with an annotation of their class that no detection of
    higher score has taken) are solid, wrong ones dashed. The long side of an image measures 320
    pixels.

    Args:
        images: RGB, (H, W, 3) uint8.
        detections: column heading -> the detections of each image.
        row_names: names of the rows, such as file names.

    Raises:
        ValueError: the numbers of images, annotations and detections differ.
    """
    if any(len(column) != len(images) for column in (truth, *detections.values())):
        raise ValueError("a grid needs annotations and detections for each image")
    columns = {"ground truth": truth, **detections}
    several = len(class_names) > 1  # a single class is named in the legend only
    cells = [
        [
            _cell(image, objects[row], truth[row] if column else None, class_names, several)
            for column, objects in enumerate(columns.values())
        ]
        for row, image in enumerate(images)
    ]
    gap, left, head, foot = 8, 22, 16 + 16 * max(c.count("\n") + 1 for c in columns), 46
    step = max(row[0].shape[1] for row in cells) + gap
    across = left + len(columns) * step
    down = head + sum(len(row[0]) + gap for row in cells) + foot
    sheet = np.full((down, across, 3), 255, np.uint8)
    figure = Figure(figsize=(across / DPI, down / DPI), dpi=DPI)
    top = head
    for number, row in enumerate(cells):
        height, width = row[0].shape[:2]
        for column, cell in enumerate(row):
            x = left + column * step
            sheet[top : top + height, x : x + width] = cell
        if row_names:
            name, fits = row_names[number], height // 6
            name = name if len(name) <= fits else "…" + name[1 - fits :]
            figure.text(11 / across, 1 - (top + height / 2) / down, literal(name), rotation=90,
                        va="center", ha="center", fontsize=7, color="0.3")  # fmt: skip
        top += height + gap
    for column, title in enumerate(columns):
        x = left + column * step + cells[0][0].shape[1] / 2
        figure.text(x / across, 1 - (head - 6) / down, literal(title), ha="center", fontsize=10)
    figure.figimage(sheet)
    _legend(figure, [truth, *detections.values()], class_names)
    return save_figure(figure, path)


def compare_runs(
    dataset: str | Sequence[Mapping[str, Any]],
    runs: Mapping[str, str | Path],
    path: str | Path,
    num_images: int = 6,
    seed: int = 0,
    threshold: float | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write the detections of several evaluated runs beside the ground truth, as one PNG.

    Args:
        dataset: a registered name, a `voc:` or `coco:` text, or Detectron2's dataset dicts.
        runs: heading -> run directory with inference/coco_instances_results.json.
        num_images: number of images, evenly spaced over those with annotations.
        seed: offset of the chosen images.
        threshold: lowest score shown; None for each model's score of best F1 over the whole data
            set. The heading states it.
        class_names: default: those of the runs' config or of the data set.

    Raises:
        UserError: a run has no predictions, or no image of the data set has annotations.
    """
    names = class_names or classes_of_runs(runs.values())
    opened = open_dataset(dataset, names, masks=any_masks(runs.values()))
    records = opened.records
    annotated = [record for record in records if record.get("annotations")]
    if not annotated:
        raise UserError(
            f"no pictures: none of the {len(records)} images has annotations; choose another split"
        )
    count = min(num_images, len(annotated))
    step = len(annotated) / count
    chosen = [annotated[(int((i + 0.5) * step) + seed) % len(annotated)] for i in range(count)]
    thresholds = {}
    for heading, run in runs.items():
        found = read_predictions(run)
        pairs = ((opened.detections(r, found), annotated_objects(r)) for r in records)
        thresholds[heading] = best_threshold(pairs) if threshold is None else threshold
    return draw_images(opened, chosen, runs, thresholds, path)


def draw_images(
    dataset: OpenDataset,
    records: Sequence[Mapping[str, Any]],
    runs: Mapping[str, str | Path],
    thresholds: Mapping[str, float],
    path: str | Path,
    notes: Sequence[str] | None = None,
) -> Path:
    """Write the detections of several runs in the images of `records`, beside the ground truth.

    Args:
        runs: heading -> run directory.
        thresholds: heading -> lowest score shown.
        path: .png, or .jpg for a much smaller file.
        notes: a few words per image, shown after its file name.
    """
    columns = {}
    for heading, run in runs.items():
        found, least = read_predictions(run), thresholds[heading]
        shown = []
        for record in records:
            results = found.get(str(record["image_id"]), [])
            objects = detected_objects(results, dataset.ids, masks=True)
            shown.append(objects.select(objects.scores_or_zero() >= least))
        columns[f"{heading}\nscore ≥ {least:.2f}"] = shown
    images = [read_picture(record["file_name"]) for record in records]
    truth = [annotated_objects(record, masks=True) for record in records]
    names = [Path(record["file_name"]).name for record in records]
    if notes is not None:
        names = [f"{name}  {note}" for name, note in zip(names, notes, strict=True)]
    return detections_grid(images, truth, columns, dataset.class_names, path, names)


def classes_of_runs(runs: Iterable[str | Path]) -> list[str] | None:
    """The classes in the config of the first run whose config names them."""
    named = (read_run(run).config.get("DATASETS.CLASSES") for run in runs)
    return next((list(names) for names in named if names), None)


def any_masks(runs: Iterable[str | Path]) -> bool:
    """Return True if a run predicts masks, or does not tell."""
    return any(read_run(run).config.get("MODEL.MASK_ON", True) for run in runs)


def _cell(
    image: NDArray[np.uint8],
    objects: Objects,
    truth: Objects | None,
    class_names: Sequence[str],
    with_names: bool,
) -> NDArray[np.uint8]:
    right = None if truth is None else match(objects, truth)
    image, objects = resize(image, objects, CELL)
    return draw_objects(image, objects, class_names, right, with_names)


def _legend(
    figure: Figure, columns: Sequence[Sequence[Objects]], class_names: Sequence[str]
) -> None:
    present = sorted({int(c) for column in columns for objects in column for c in objects.classes})
    colors = palette(len(class_names)) / 255
    handles = [Line2D([], [], color=colors[c], linewidth=4) for c in present]
    labels = [literal(str(class_names[c])) for c in present]
    for style, meaning in ((SOLID, "right (IoU ≥ 0.5)"), (DASHED, "wrong")):
        handles.append(Line2D([], [], color="0.3", linewidth=1.8, linestyle=style))
        labels.append(meaning)
    figure.legend(handles, labels, loc="lower center", ncols=10, fontsize=7.5, frameon=False,
                  handlelength=2, columnspacing=1.2)  # fmt: skip

"""Detections drawn on images: one model's, or several beside the ground truth."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from moco_det.errors import UserError
from moco_det.objects import (
    Objects,
    OpenDataset,
    annotated_objects,
    best_threshold,
    detected_objects,
    match,
    open_dataset,
    read_predictions,
)
from moco_det.plots import save_figure
from moco_det.runs import read_run

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


def detections_grid(
    images: Sequence[NDArray[np.uint8]],
    truth: Sequence[Objects],
    detections: Mapping[str, Sequence[Objects]],
    class_names: Sequence[str],
    path: str | Path,
    row_names: Sequence[str] | None = None,
) -> Path:
    """Write one PNG: a row an image, the ground truth first, then a column each model.

    Right detections (IoU 0.5 with an annotation of their class that no surer one took) are
    solid, wrong ones dashed. Images are shown with 320 pixels on their long side.

    Args:
        images: RGB, (H, W, 3) uint8.
        detections: heading of the column -> the detections of each image.
        row_names: names for the rows, such as file names.

    Raises:
        ValueError: the numbers of images, annotations and detections differ.
    """
    if any(len(column) != len(images) for column in (truth, *detections.values())):
        raise ValueError("a grid needs annotations and detections for each image")
    columns = {"ground truth": truth, **detections}
    sizes = []
    for image in images:
        height, width = image.shape[:2]
        scale = CELL / max(height, width)
        sizes.append((max(1, round(width * scale)), max(1, round(height * scale))))
    gap, left, head, foot = 8, 22, 16 + 16 * max(c.count("\n") + 1 for c in columns), 46
    across = left + len(columns) * (max(w for w, _ in sizes) + gap)
    down = head + sum(h + gap for _, h in sizes) + foot
    figure = Figure(figsize=(across / DPI, down / DPI), dpi=DPI, facecolor="white")

    top = head
    for row, (image, (width, height)) in enumerate(zip(images, sizes, strict=True)):
        for column, (title, objects) in enumerate(columns.items()):
            x = left + column * ((across - left) / len(columns))
            place = (x / across, 1 - (top + height) / down, width / across, height / down)
            axes = figure.add_axes(place)
            right = match(objects[row], truth[row]) if column else None
            # The legend is enough for a single class.
            several = len(class_names) > 1
            draw_objects(axes, image, objects[row], class_names, right, (width, height), several)
            if not row:
                axes.set_title(title, fontsize=10)
        if row_names:
            y = 1 - (top + height / 2) / down
            name, fits = row_names[row], height // 6
            name = name if len(name) <= fits else "…" + name[1 - fits :]
            figure.text(11 / across, y, name, rotation=90, va="center", ha="center",
                        fontsize=7, color="0.3")  # fmt: skip
        top += height + gap
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
        num_images: spread evenly over the images that have annotations; `seed` shifts them.
        threshold: least score shown; None: each model's own, where its F1 over the whole data
            set is best (in the heading).
        class_names: default: those of the runs' config or of the data set.

    Raises:
        UserError: a run has no predictions, or no image of the data set has annotations.
    """
    opened = open_dataset(dataset, class_names or classes_of_runs(runs.values()))
    records = opened.records
    annotated = [record for record in records if record.get("annotations")]
    if not annotated:
        raise UserError(f"no pictures: none of the {len(records)} images has annotations")
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
        runs: heading -> run directory; `thresholds` holds the least score of each.
        path: .png, or .jpg for a much smaller file.
        notes: a few words for each image, behind its file's name.
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
    images = [read_image(record["file_name"], "RGB") for record in records]
    truth = [annotated_objects(record, masks=True) for record in records]
    names = [Path(record["file_name"]).name for record in records]
    if notes is not None:
        names = [f"{name}  {note}" for name, note in zip(names, notes, strict=True)]
    return detections_grid(images, truth, columns, dataset.class_names, path, names)


def classes_of_runs(runs: Iterable[str | Path]) -> list[str] | None:
    """The classes that the first run to name them was trained for."""
    named = (read_run(run).config.get("DATASETS.CLASSES") for run in runs)
    return next((list(names) for names in named if names), None)


def _legend(
    figure: Figure, columns: Sequence[Sequence[Objects]], class_names: Sequence[str]
) -> None:
    present = sorted({int(c) for column in columns for objects in column for c in objects.classes})
    handles = [Line2D([], [], color=COLORS[c % len(COLORS)], linewidth=4) for c in present]
    labels = [str(class_names[c]) for c in present]
    for style, meaning in ((SOLID, "right (IoU ≥ 0.5)"), (DASHED, "wrong")):
        handles.append(Line2D([], [], color="0.3", linewidth=1.8, linestyle=style))
        labels.append(meaning)
    figure.legend(handles, labels, loc="lower center", ncols=10, fontsize=7.5, frameon=False,
                  handlelength=2, columnspacing=1.2)  # fmt: skip


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

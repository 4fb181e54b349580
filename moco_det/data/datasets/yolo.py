"""Reader of YOLO data sets: ``data.yaml``, images, and a text file of labels for each image.

A line is ``class cx cy w h`` or ``class x0 y0 x1 y1 x2 y2 ...``, the outline of an object; all
coordinates are shares of the image's width and height (https://docs.ultralytics.com/datasets).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.structures import BoxMode

from moco_common.config import parse_yaml
from moco_common.errors import UserError
from moco_common.files import read_text
from moco_common.text import counted
from moco_det.data.datasets.coco_masks import mask_area
from moco_det.data.datasets.findings import DatasetReport
from moco_det.data.datasets.image_files import files_below, folded, is_image
from moco_det.data.datasets.image_frame import Frame, ImageHeader, mend_box, read_headers
from moco_det.data.datasets.values import read_id, read_number

SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
NAME_FILES = ("classes.txt", "labels/classes.txt", "obj.names", "data/obj.names")
# Lines as spreadsheets write them, where a comma can have one meaning only.
COMMAS = "labels contain commas, as separators or decimal commas: read as such"
DECIMAL_COMMA = re.compile(r"-?\d+(,\d+)?")
SEPARATING_COMMAS = re.compile(r"[^\s,]+(\s*,\s*[^\s,]+)+")
ENOUGH = 8  # lines whose keypoints without visibility can be told from outlines
TOLERANCE = 0.01  # by which rounding may move a share out of 0 to 1


@dataclass(frozen=True)
class _Description:
    """The content of ``data.yaml`` as far as it is used."""

    file: Path | None
    names: dict[int, str] | None
    splits: dict[str, list[str]]
    points: int  # keypoints of an object


def read_yolo(
    folder: Path, split: str, report: DatasetReport
) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """Read one split: ``train``, ``val``, ``test``, or ``all`` for every image.

    Returns:
        Detectron2's dataset dicts, with class *names* under ``category_id`` and ``area`` (square
        pixels) in each annotation; the class names by number; and the metadata ``category_ids``.

    Raises:
        UserError: there is no such split, no labels, or labels in pixels.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a YOLO data set, as it does not exist")
    description = _describe(folder)
    images = _images(folder, split, description)
    labels = [_label_file(path) for path in images]
    if not any(map(os.path.isfile, labels)):
        raise UserError(
            f"{folder}: none of {counted(len(images), 'image', ',')} has a label file (looked for "
            f"{labels[0]}): a YOLO data set holds images/NAME.jpg and labels/NAME.txt"
        )
    texts = [_read_lines(path, report) for path in labels]
    values = [row for lines in texts if isinstance(lines, list) for _, row in lines if row]
    points = description.points or _points_of_poses(values)
    _refuse_pixels([row[1:5] if points else row[1:] for row in values], report.spec)
    _refuse_confidences(values, report.spec)
    names = description.names or _listed_names(folder)
    if names is None:
        most = max((int(row[0]) for row in values if row[0] >= 0), default=-1)
        names = {number: f"class {number}" for number in range(min(most + 1, 10_000))}
        report.notes.append("no file names the classes (data.yaml, classes.txt): numbered")
    if points:
        report.notes.append("keypoints are not read: convert them to COCO's format")
    elif values and all(len(row) == 9 for row in values):
        report.notes.append(
            "all outlines have four corners: oriented boxes count as the upright boxes around them"
        )
    classes = list(dict.fromkeys(names[number] for number in sorted(names)))
    ids = {names[number]: number for number in sorted(names, reverse=True)}

    records: list[dict[str, Any]] = []
    files = [os.path.relpath(path, folder) for path in images]
    for path, file, label, lines, header in zip(
        images, files, labels, texts, read_headers(images), strict=True
    ):
        if isinstance(header, str) or isinstance(lines, str):
            kind = header if isinstance(header, str) else str(lines)
            report.add(kind, file, action="image skipped")
            continue
        if lines is None:
            report.add("label file missing", file, action="taken as without objects")
        where = os.path.relpath(label, folder)
        record = _record(
            path,
            file,
            header,
            lines or [],
            label=where,
            names=names,
            points=points,
            report=report,
        )
        records.append(record)
    _name_unused_labels(folder, images, labels, report)
    return records, classes, {"category_ids": ids}


def _describe(folder: Path) -> _Description:
    """Read the YAML file beside the images, if there is one."""
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    files = [path for path in files if path.stem in ("data", "dataset")] or files
    for path in files:
        try:
            content = parse_yaml(read_text(path))
        except yaml.YAMLError as error:
            raise UserError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
        if isinstance(content, dict) and "names" in content:
            return _description(path, content)
    return _Description(None, None, {}, 0)


def _description(path: Path, content: dict[Any, Any]) -> _Description:
    given = content["names"]
    pairs = list(enumerate(given)) if isinstance(given, list) else None
    if isinstance(given, dict):
        pairs = [(int(key), name) for key, name in given.items() if str(key).isdecimal()]
    if not pairs or (isinstance(given, dict) and len(pairs) != len(given)):
        raise UserError(f"{path}: 'names' must be a list of class names, or number: name")
    names = {number: (read_id(name) or str(name)).strip() for number, name in pairs}
    if len(set(names.values())) < len(names) or "" in names.values():
        raise UserError(f"{path}: 'names' holds a class name twice, or an empty one")
    base = content.get("path")
    splits: dict[str, list[str]] = {}
    for key in ("train", "val", "test"):
        entries = content.get(key)
        entries = entries if isinstance(entries, list) else [entries]
        known = [entry for entry in entries if isinstance(entry, str) and entry]
        if isinstance(base, str):
            known = [*known, *(os.path.join(base, entry) for entry in known)]
        if known:
            splits[key] = known
    shape = content.get("kpt_shape")
    points = shape[0] if isinstance(shape, list) and shape and isinstance(shape[0], int) else 0
    return _Description(path, names, splits, max(0, points))


def _images(folder: Path, split: str, description: _Description) -> list[str]:
    """The images of a split, sorted: those the description names, else those of its folder."""
    root = folder.absolute()
    if split == "all":
        found = sorted(path for _, path in files_below(root) if is_image(path))
        if not found:
            raise UserError(f"{folder} is not a YOLO data set, as it holds no image")
        return found
    key = SPLIT_KEYS.get(split, split)
    for entry in description.splits.get(key, []):
        for place in _places(root, entry):
            found = list(_images_of(place, root))
            if found:
                return sorted(dict.fromkeys(found))
    names = sorted(name for name, other in SPLIT_KEYS.items() if other == key) or [split]
    for name in dict.fromkeys([split, *names]):
        for place in (root / "images" / name, root / name / "images", root / name):
            found = list(_images_of(place, root))
            if found:
                return sorted(found)
    there = list(description.splits)
    there += [path.name for base in (root / "images", root) for path in sorted(base.glob("*/"))]
    shown = ", ".join(dict.fromkeys([*there, "all"]))
    raise UserError(
        f"{folder} has no images of the split '{split}' (no folder images/{split} or "
        f"{split}/images, and none that data.yaml names): there are: {shown}; or a share such as "
        "90% and 90%-rest"
    )


def _places(root: Path, entry: str) -> Iterator[Path]:
    """Where an entry of the description may be: exporters write paths from elsewhere."""
    parts = [part for part in entry.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        yield root.joinpath(*parts[start:])


def _images_of(place: Path, root: Path) -> Iterator[str]:
    """The images below a folder, or those that a text file lists."""
    if place.is_dir():
        yield from (path for _, path in files_below(place) if is_image(path))
    elif place.suffix == ".txt" and place.is_file():
        for line in read_text(place).splitlines():
            if line.strip():
                found = (path for path in _places(root, line.strip()) if path.is_file())
                yield str(next(found, root / line.strip()))


def _label_file(image: str) -> str:
    """``.../labels/NAME.txt`` for ``.../images/NAME.jpg``, in any case; else beside the image."""
    at = image.lower().rfind("/images/")
    head, tail = image[: at + 1], image[at + len("/images/") :]
    moved = [f"{head}{name}/{tail}" for name in ("labels", "Labels", "LABELS") if at >= 0]
    labels = [f"{os.path.splitext(path)[0]}.txt" for path in (*moved, image)]
    return next(filter(os.path.isfile, labels), labels[0])


def _read_lines(path: str, report: DatasetReport) -> list[tuple[int, list[float]]] | str | None:
    """(line number, its numbers) of a label file, () where unreadable; None without a file."""
    if not os.path.isfile(path):
        return None
    try:
        lines = read_text(path).splitlines()
    except UserError:
        return "labels unreadable"
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            words = _words(line)
            if words != line.split() and COMMAS not in report.notes:
                report.notes.append(COMMAS)
            row = [read_number(word) for word in words]
            known = [value for value in row if value is not None]
            rows.append((number, known if len(known) == len(row) else []))
    return rows


def _words(line: str) -> list[str]:
    """The numbers of a line as strings, with decimal points.

    ``0,0.5,0.5,0.2,0.2`` and ``0 0,5 0,5 0,2 0,2`` are read as ``0 0.5 0.5 0.2 0.2``.
    """
    words = line.split()
    if "," not in line:
        return words
    if "," not in words[0] and all(map(DECIMAL_COMMA.fullmatch, words)):
        return [word.replace(",", ".") for word in words]
    if "." in line and SEPARATING_COMMAS.fullmatch(line.strip()):
        return line.replace(",", " ").split()
    return words


def _refuse_pixels(rows: Sequence[list[float]], spec: str) -> None:
    """Refuse a data set most of whose coordinates are no shares.

    Raises:
        UserError: they are pixels, or something else.
    """
    beyond = sum(not _are_shares(row) for row in rows)
    if 2 * beyond > len(rows):
        raise UserError(
            f"{spec}: {beyond:,} of {counted(len(rows), 'object', ',')} have coordinates outside 0 "
            "to 1, so they are pixels: YOLO's are shares of the image; divide x and width by the "
            "width of the image, y and height by its height"
        )


def _points_of_poses(rows: Sequence[list[float]]) -> int:
    """The keypoints of an object where all lines are ``class cx cy w h`` and keypoints inside that
    box, which a description without ``kpt_shape`` does not tell; 0 for outlines."""
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        return 0
    (length,) = lengths
    array = np.array(rows, dtype=np.float64)
    for numbers, least in ((3, 1), (2, ENOUGH)):  # x, y and visibility; x and y
        if length <= 5 or (length - 5) % numbers or len(rows) < least:
            continue
        points = array[:, 5:].reshape(len(rows), -1, numbers)
        labelled = points[..., 2] > 0 if numbers == 3 else (points > 0).any(axis=2)
        if numbers == 3 and not np.isin(points[..., 2], (0, 1, 2)).all():
            continue
        center, sides = array[:, None, 1:3], array[:, None, 3:5]
        inside = (np.abs(points[..., :2] - center) <= sides / 2 + TOLERANCE).all(axis=2)
        if (sides > 0).all() and (inside | ~labelled).all():
            return points.shape[1]
    return 0


def _refuse_confidences(rows: Sequence[list[float]], spec: str) -> None:
    """Refuse a data set whose lines are ``class cx cy w h confidence``, as predictions are saved.

    Raises:
        UserError: most lines are of this form.
    """
    beyond = sum(len(row) == 6 for row in rows)
    if 2 * beyond > len(rows):
        raise UserError(
            f"{spec}: {beyond:,} of {counted(len(rows), 'line', ',')} have six numbers, as saved "
            "predictions with a confidence have: remove the last number of each, and check that "
            "these are meant as annotations"
        )


def _are_shares(values: Sequence[float]) -> bool:
    return all(-TOLERANCE <= value <= 1 + TOLERANCE for value in values)


def _listed_names(folder: Path) -> dict[int, str] | None:
    """Class names from a text file, one a line."""
    for name in NAME_FILES:
        if (folder / name).is_file():
            text = read_text(folder / name)
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if len(set(lines)) < len(lines):
                raise UserError(f"{folder / name} holds a class name twice")
            return dict(enumerate(lines))
    return None


def _record(
    path: str,
    file: str,
    header: ImageHeader,
    lines: list[tuple[int, list[float]]],
    *,
    label: str,
    names: dict[int, str],
    points: int,
    report: DatasetReport,
) -> dict[str, Any]:
    frame = Frame(*header.shown)
    if header.orientation != 1 and lines:
        kind = "EXIF rotation, while labels are shares of the image as it is shown"
        report.notes[:] = [*report.notes, kind] if kind not in report.notes else report.notes
    annotations = []
    seen: set[tuple[float, ...]] = set()
    for number, row in lines:
        obj = f"line {number}"
        if tuple(row) in seen:
            report.add("object listed twice", label, obj, action="taken once")
            continue
        if row:
            seen.add(tuple(row))
        annotation = _object(
            row, frame, names=names, points=points, report=report, file=label, obj=obj
        )
        if annotation is not None:
            annotations.append(annotation)
    return {
        "file_name": path,
        "image_id": os.path.splitext(file)[0].replace(os.sep, "/"),
        "width": frame.width,
        "height": frame.height,
        "annotations": annotations,
    }


def _object(
    row: list[float],
    frame: Frame,
    *,
    names: dict[int, str],
    points: int,
    report: DatasetReport,
    file: str,
    obj: str,
) -> dict[str, Any] | None:
    """One line as Detectron2's annotation, or None where it cannot be used."""
    count = len(row) - 1
    boxed = count == 4 or (points > 0 and count in (4 + 2 * points, 4 + 3 * points))
    if not boxed and (count < 6 or count % 2):
        kind = "line that is neither 'class cx cy w h' nor 'class x0 y0 x1 y1 x2 y2 ...'"
        report.add(kind, file, obj, action="object skipped")
        return None
    if row[0] not in names:
        report.add(f"class {row[0]:g} without a name", file, obj, action="object skipped")
        return None
    values = row[1:5] if boxed else row[1:]
    if not _are_shares(values):
        report.add("coordinates outside 0 to 1", file, obj, action="object skipped")
        return None
    width, height = frame.width, frame.height
    mask: list[list[float]] | None = None
    if boxed:
        cx, cy, w, h = values
        if w <= 0 or h <= 0:
            report.add("box empty", file, obj, action="object skipped")
            return None
        corners = [(cx - w / 2) * width, (cy - h / 2) * height]
        corners += [(cx + w / 2) * width, (cy + h / 2) * height]
    else:
        outline = np.array(values).reshape(-1, 2) * (width, height)
        corners = [*outline.min(axis=0).tolist(), *outline.max(axis=0).tolist()]
        mask = [outline.reshape(-1).tolist()]
    box = mend_box(corners, frame, report=report, file=file, obj=obj)
    if box is None:
        return None
    area = mask_area(mask) if mask else 0.0
    annotation: dict[str, Any] = {
        "category_id": names[int(row[0])],
        "bbox": box,
        "bbox_mode": BoxMode.XYXY_ABS,
        "iscrowd": 0,
        "area": area or (box[2] - box[0]) * (box[3] - box[1]),
    }
    if mask and area > 0:
        annotation["segmentation"] = mask
    return annotation


def _name_unused_labels(
    folder: Path, images: Sequence[str], labels: Sequence[str], report: DatasetReport
) -> None:
    """Name the label files without an image, in the folders of those that have one."""
    used = {folded(path) for path in labels}
    stems = {
        os.path.splitext(entry)[0]
        for place in {os.path.dirname(path) for path in images}
        for entry in os.listdir(place)
        if is_image(entry)
    }
    for place in sorted({os.path.dirname(path) for path in labels if os.path.isfile(path)}):
        for entry in sorted(os.listdir(place)):
            path = os.path.join(place, entry)
            stem, suffix = os.path.splitext(entry)
            other = entry == "classes.txt" or stem.startswith("README") or stem in stems
            if suffix == ".txt" and folded(path) not in used and not other:
                report.add("image missing", os.path.relpath(path, folder), action="labels skipped")

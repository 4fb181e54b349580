"""Reader of folders in PASCAL VOC layout: ``Annotations``, ``ImageSets/Main``, ``JPEGImages``.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010; the layout and
the pixel convention (counted from 1, both corners inside the box) are the development kit's.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from moco_common.errors import UserError
from moco_det.data.datasets.findings import DatasetReport
from moco_det.data.datasets.image_frame import (
    ImageHeader,
    find_frame,
    mend_box,
    read_headers,
)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class _Annotation:
    """The content of one XML file; objects are (name, corners, difficult), None if unreadable."""

    size: tuple[int, int] | None = None
    filename: str = ""
    objects: list[tuple[str, list[float] | None, int | None]] = field(default_factory=list)


class VOCFolder:
    """A folder in VOC layout: every annotation is read once, for all splits.

    Raises:
        UserError: it is not such a folder.
    """

    def __init__(self, folder: Path) -> None:
        for name in ("Annotations", "JPEGImages"):
            if not (folder / name).is_dir():
                nested = [child.parent for child in sorted(folder.glob("*/Annotations"))[:1]]
                hint = f"did you mean {nested[0]}?" if nested else "name the folder that holds it"
                raise UserError(
                    f"{folder} is not a VOC folder, it has no folder {name} "
                    f"(a VOC folder holds Annotations, ImageSets/Main and JPEGImages): {hint}"
                )
        self.folder = folder
        self._annotations = _read_annotations(folder / "Annotations")
        self._images = _list_images(folder / "JPEGImages")

    def read(self, split: str, report: DatasetReport) -> tuple[list[dict[str, Any]], list[str]]:
        """Read one split.

        Returns:
            Detectron2's dataset dicts, with class *names* under ``category_id`` and ``difficult``
            (0 or 1) in each annotation; and the sorted names of all classes in the folder, which
            are the same for each of its splits.

        Raises:
            UserError: there is no such split.
        """
        ids = _read_split(self.folder, split, self._annotations, report)
        kept = self._with_images(ids, report)
        headers = read_headers([path for _, _, path in kept])
        records = [
            record
            for (image_id, annotation, path), header in zip(kept, headers, strict=True)
            if (record := self._record(image_id, annotation, path, header, report)) is not None
        ]
        classes = {
            name
            for annotation in self._annotations.values()
            if isinstance(annotation, _Annotation)
            for name, _, _ in annotation.objects
        }
        return records, sorted(classes - {""})

    def _with_images(
        self, ids: list[str], report: DatasetReport
    ) -> list[tuple[str, _Annotation, Path]]:
        """Image id, annotation and image file, where there are both."""
        kept = []
        for image_id in ids:
            annotation = self._annotations.get(image_id, "annotation missing")
            if isinstance(annotation, str):
                report.add(annotation, f"Annotations/{image_id}.xml", action="image skipped")
                continue
            named = os.path.splitext(annotation.filename)[0]
            path = self._images.get(image_id) or self._images.get(named)
            if path is None:
                report.add("image missing", f"JPEGImages/{image_id}", action="image skipped")
                continue
            kept.append((image_id, annotation, path))
        return kept

    def _record(
        self,
        image_id: str,
        annotation: _Annotation,
        path: Path,
        header: ImageHeader | str,
        report: DatasetReport,
    ) -> dict[str, Any] | None:
        if isinstance(header, str):
            report.add(header, path.relative_to(self.folder), action="image skipped")
            return None
        file = f"Annotations/{image_id}.xml"
        corners_read = [corners for _, corners, _ in annotation.objects if corners]
        frame = find_frame(header, annotation.size, corners_read, report, file)
        if frame is None:
            return None
        objects = []
        for number, (name, corners, difficult) in enumerate(annotation.objects, start=1):
            obj = f"object {number} ({name})"
            if not name:
                report.add("class name missing", file, obj, action="object skipped")
                continue
            box = _counted_from_zero(corners, report, file, obj)
            mended = box and mend_box(frame.box(box), frame, report, file, obj)
            if not mended:
                continue
            if difficult is None:
                report.add("difficult missing", file, obj, action="taken as 0")
            objects.append(
                {
                    "category_id": name,
                    "bbox": mended,
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "iscrowd": 0,
                    "difficult": difficult or 0,
                }
            )
        return {
            "file_name": str(path),
            "image_id": image_id,
            "width": frame.width,
            "height": frame.height,
            "annotations": objects,
        }


def _counted_from_zero(
    corners: list[float] | None, report: DatasetReport, file: str, obj: str
) -> list[float] | None:
    """VOC's pixel corners (from 1, inclusive) as a box in coordinate space (from 0, exclusive).

    None where the corners are no box. Equal corners would be one pixel wide by the letter of the
    convention; in practice they are an accidental click, so they count as empty.
    """
    if corners is None:
        report.add("box unreadable", file, obj, action="object skipped")
        return None
    x0, y0, x1, y1 = corners
    if x1 == x0 or y1 == y0:
        report.add("box empty", file, obj, action="object skipped")
        return None
    if x1 < x0 or y1 < y0:  # the same box from its other corners
        report.add("box corners swapped", file, obj, action="put in order")
        x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    return [x0 - 1.0, y0 - 1.0, x1, y1]


def _read_annotations(folder: Path) -> dict[str, _Annotation | str]:
    """All XML files below ``folder`` by name without suffix; a text for an unreadable one."""
    return {
        name: _read_annotation(path)
        for name, path in _files_below(folder)
        if path.lower().endswith(".xml")
    }


def _files_below(folder: Path) -> Iterator[tuple[str, str]]:
    """(path below ``folder`` without suffix, path) of all files, folder by folder, sorted."""
    start = len(os.path.join(folder, ""))
    for root, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            path = os.path.join(root, file)
            yield os.path.splitext(path[start:])[0], path


def _read_annotation(path: str) -> _Annotation | str:
    try:
        with open(path, "rb") as file:
            root = ET.fromstring(file.read())
    except (ET.ParseError, OSError, ValueError, LookupError):  # LookupError: unknown encoding
        return "annotation unreadable"
    annotation = _Annotation(filename=(root.findtext("filename") or "").strip())
    width, height = _number(root.findtext("size/width")), _number(root.findtext("size/height"))
    if width and height and width > 0 and height > 0:
        annotation.size = (round(width), round(height))
    for obj in root.findall("object"):
        # One pass over the children is several times faster than a findtext for each.
        parts = {child.tag: child for child in reversed(obj)}  # the first of several
        box = {child.tag: child.text for child in reversed(parts.get("bndbox", ()))}
        read = [_number(box.get(corner)) for corner in CORNERS]
        corners = [value for value in read if value is not None]
        texts = {tag: part.text or "" for tag, part in parts.items()}
        difficult = _number(texts.get("difficult"))
        annotation.objects.append(
            (
                texts.get("name", "").strip(),
                corners if len(corners) == 4 else None,
                None if difficult is None else int(difficult != 0),
            )
        )
    return annotation


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e9 else None  # neither NaN nor infinite


def _list_images(folder: Path) -> dict[str, Path]:
    """All images below ``folder`` by their name without suffix."""
    found: dict[str, Path] = {}
    for name, path in _files_below(folder.absolute()):
        if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
            found.setdefault(name, Path(path))
    return found


def _read_split(
    folder: Path, split: str, annotations: dict[str, Any], report: DatasetReport
) -> list[str]:
    """The ids of a split. ``all`` means every annotation unless a file defines it."""
    sets = folder / "ImageSets" / "Main"
    path = sets / f"{split}.txt"
    if not path.is_file():
        if split == "all":
            return sorted(annotations)
        there = ", ".join([*sorted(file.stem for file in sets.glob("*.txt")), "all"])
        raise UserError(
            f"{folder} has no split '{split}' (no file ImageSets/Main/{split}.txt): "
            f"the splits there are: {there}"
        )
    ids: dict[str, None] = {}
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        image_id = line.strip()
        if not image_id:
            continue
        if image_id not in annotations:  # "id -1" in the files of one class, or "id.jpg"
            first = image_id.split()[0]
            stem, suffix = os.path.splitext(first)
            image_id = stem if suffix.lower() in IMAGE_SUFFIXES else first
        if image_id in ids:
            report.add("id twice in the split", path.name, image_id, action="taken once")
        ids[image_id] = None
    return list(ids)

"""Reader of PASCAL VOC annotations: one XML file for each image.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010; the pixel
convention (counted from 1, both corners inside the box) is the development kit's. Its layout is
``Annotations``, ``ImageSets/Main`` and ``JPEGImages``; others are found by themselves.
"""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode

from moco_common.errors import UserError
from moco_common.files import read_regular, read_text
from moco_det.data.datasets.findings import DatasetReport
from moco_det.data.datasets.image_files import closest, files_below, folded, is_image
from moco_det.data.datasets.image_frame import (
    ImageHeader,
    find_frame,
    mend_box,
    ordered_corners,
    read_headers,
)
from moco_det.data.datasets.units import refuse_normalised
from moco_det.data.datasets.values import read_flag, read_number

CORNERS = ("xmin", "ymin", "xmax", "ymax")
# Folders that only sort the files of an image by kind, in any case.
KINDS = frozenset(
    (
        "annotations annotation annots annot ann xmls xml labels label "
        "jpegimages images image imgs img pictures photos"
    ).split()
)
Images = dict[str, list[str]]  # image id -> paths of the files of that name


class _Object(NamedTuple):
    """One object of an XML file: what is unreadable is None."""

    name: str
    corners: tuple[float, ...] | None
    difficult: bool | None
    fault: str = ""  # what is odd about its box, and how it was handled


@dataclass
class _Annotation:
    """The content of one XML file."""

    file: str  # below the data set's folder
    size: tuple[int, int] | None = None
    filename: str = ""
    objects: list[_Object] = field(default_factory=list)


class VOCFolder:
    """A folder of images and XML files: every annotation is read once, for all splits.

    An image and its annotation have the same path but for the suffix and for folders that only sort
    the files by kind: ``Annotations/1.xml`` and ``JPEGImages/1.jpg``, ``train/annots/1.xml`` and
    ``train/images/1.jpg``, ``train/1.xml`` and ``train/1.jpg``.

    Raises:
        UserError: it is not such a folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kit = [folder / name for name in ("Annotations", "JPEGImages")]
        if not all(map(Path.is_dir, kit)):
            _check_layout(folder)
            kit = [folder]
        self._annotations: dict[str, _Annotation | str] = {}
        self._images: Images = defaultdict(list)
        for base in kit:
            for below, path in files_below(base.absolute()):
                key = os.path.splitext(below)[0]
                if base == folder:
                    key = _without_kinds(key)
                if path.lower().endswith(".xml"):
                    read = _read_annotation(path, os.path.relpath(path, folder.absolute()))
                    twice = "several annotations of one name"
                    self._annotations[key] = twice if key in self._annotations else read
                elif is_image(path):
                    self._images[key].append(path)
        self._asked = False  # the nearest file is looked for once
        self._folded: dict[str, list[str]] = defaultdict(list)
        for key in self._images:
            self._folded[folded(key)].append(key)

    def read(self, split: str, report: DatasetReport) -> tuple[list[dict[str, Any]], list[str]]:
        """Read one split.

        Returns:
            Detectron2's dataset dicts, with class *names* under ``category_id`` and ``difficult``
            (0 or 1) in each annotation; and the sorted names of all classes in the folder, which
            are the same for each of its splits.

        Raises:
            UserError: there is no such split, or its boxes are not in pixels.
        """
        ids = self._split(split, report)
        kept = self._with_images(ids, report)
        corners = [o.corners for _, annotation, _ in kept for o in annotation.objects if o.corners]
        array = np.array(corners, dtype=np.float64).reshape(-1, 4)
        refuse_normalised(array, report.spec, "pixels")
        headers = read_headers([path for _, _, path in kept])
        records = [
            record
            for (image_id, annotation, path), header in zip(kept, headers, strict=True)
            if (record := self._record(image_id, annotation, path, header, report)) is not None
        ]
        classes = {
            item.name
            for annotation in self._annotations.values()
            if isinstance(annotation, _Annotation)
            for item in annotation.objects
        }
        return records, sorted(classes - {""})

    def _split(self, split: str, report: DatasetReport) -> list[str]:
        """The ids of a split: of a list, of a folder or, for ``all``, of all annotations."""
        lists = {
            path.stem: path
            for place in (".", "ImageSets", "ImageSets/Main")
            for path in sorted((self.folder / place).glob("*.txt"))
            if place != "." or path.stem == split  # other texts may lie there
        }
        if split in lists:
            return self._listed_ids(lists[split], report)
        below = {key.partition("/")[0] for key in self._annotations if "/" in key}
        if split != "all" and split not in below:
            there = ", ".join([*sorted(lists), *sorted(below - lists.keys()), "all"])
            raise UserError(
                f"{self.folder} has no split '{split}' (no file ImageSets/Main/{split}.txt and no "
                f"folder {split} of annotations): the splits there are: {there}; or a share such "
                "as 90% and 90%-rest"
            )
        prefix = "" if split == "all" else f"{split}/"
        self._pass_over(prefix, report)
        return sorted(key for key in self._annotations if key.startswith(prefix))

    def _pass_over(self, prefix: str, report: DatasetReport) -> None:
        """Name the images that no annotation is about."""
        used = {
            os.path.splitext(annotation.filename)[0]
            for annotation in self._annotations.values()
            if isinstance(annotation, _Annotation)
        }
        spelled = {folded(key) for key in self._annotations}
        for key, paths in self._images.items():
            if key.startswith(prefix) and folded(key) not in spelled and key not in used:
                file = os.path.relpath(paths[0], self.folder.absolute())
                report.add("image without an annotation", file, action="passed over")

    def _listed_ids(self, path: Path, report: DatasetReport) -> list[str]:
        ids: dict[str, None] = {}
        for line in read_text(path).splitlines():
            if not line.strip():
                continue
            image_id = self._listed_id(line.strip())
            if image_id in ids:
                report.add("id twice in the split", path.name, image_id, action="taken once")
            ids[image_id] = None
        return list(ids)

    def _listed_id(self, line: str) -> str:
        """The id in a line of a list: alone, or with suffix, folders or a class's flag."""
        first, _, flag = line.rpartition(" ")
        forms = [line, *([first.strip()] if flag in ("-1", "0", "1") else []), line.split()[0]]
        for form in forms:
            path = form.replace("\\", "/")
            stem = os.path.splitext(path)[0] if is_image(path) else path
            for key in (path, stem, _without_kinds(stem), stem.rpartition("/")[2]):
                if key in self._annotations:
                    return key
        # No such annotation: the report names it as the list does.
        return next((form for form in forms[:-1] if form in self._images), forms[-1])

    def _with_images(
        self, ids: list[str], report: DatasetReport
    ) -> list[tuple[str, _Annotation, str]]:
        """Image id, annotation and image file, where there are both."""
        wanted = Counter(
            os.path.splitext(annotation.filename)[0]
            for annotation in self._annotations.values()
            if isinstance(annotation, _Annotation)
        )
        kept = []
        for image_id in ids:
            annotation = self._annotations.get(image_id, "annotation missing")
            if isinstance(annotation, str):
                report.add(annotation, f"Annotations/{image_id}.xml", action="image skipped")
                continue
            path = self._image(image_id, annotation, wanted, report)
            if path is not None:
                kept.append((image_id, annotation, path))
        return kept

    def _image(
        self, image_id: str, annotation: _Annotation, wanted: Counter[str], report: DatasetReport
    ) -> str | None:
        """The image of an annotation: that of its own name, else the one that only it names."""
        stem, suffix = os.path.splitext(annotation.filename)
        found = self._images.get(image_id, [])
        if not found:
            spelled = self._folded.get(folded(image_id), [])
            if len(spelled) == 1 and spelled[0] not in self._annotations:
                found = self._images[spelled[0]]
                kind, where = "image name in another spelling", f"the file is {spelled[0]}"
                report.add(kind, annotation.file, where, action="found")
        if not found and wanted[stem] == 1 and stem not in self._annotations:
            found = self._images.get(stem, [])
        if len(found) > 1:
            named = [path for path in found if path.lower().endswith(suffix.lower()) and suffix]
            if len(named) != 1:
                files = ", ".join(os.path.relpath(path, self.folder.absolute()) for path in found)
                kind = "several images of one name"
                report.add(kind, annotation.file, files, action="image skipped")
                return None
            found = named
        if not found:
            near = closest(image_id, {key: key for key in self._images} if not self._asked else [])
            self._asked = True
            where = f"the nearest file is {self._images[near][0]}" if near else ""
            report.add("image missing", f"JPEGImages/{image_id}", where, action="image skipped")
            return None
        return found[0]

    def _record(
        self,
        image_id: str,
        annotation: _Annotation,
        path: str,
        header: ImageHeader | str,
        report: DatasetReport,
    ) -> dict[str, Any] | None:
        if isinstance(header, str):
            file = os.path.relpath(path, self.folder.absolute())
            report.add(header, file, action="image skipped")
            return None
        file = annotation.file
        corners_read = [o.corners for o in annotation.objects if o.corners]
        frame = find_frame(header, annotation.size, corners_read, report=report, file=file)
        if frame is None:
            return None
        objects = []
        seen: set[_Object] = set()
        for number, item in enumerate(annotation.objects, start=1):
            obj = f"object {number} ({item.name})"
            if not item.name:
                report.add("class name missing", file, obj, action="object skipped")
                continue
            if item in seen and item.corners:
                report.add("object listed twice", file, obj, action="taken once")
                continue
            seen.add(item)
            box = _counted_from_zero(item.corners, report, file, obj)
            mended = box and mend_box(frame.box(box), frame, report=report, file=file, obj=obj)
            if not mended:
                continue
            if item.fault:
                kind, _, action = item.fault.partition(": ")
                report.add(kind, file, obj, action=action)
            if item.difficult is None:
                report.add("difficult missing", file, obj, action="taken as 0")
            objects.append(
                {
                    "category_id": item.name,
                    "bbox": mended,
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "iscrowd": 0,
                    "difficult": int(item.difficult or 0),
                }
            )
        return {
            "file_name": path,
            "image_id": image_id,
            "width": frame.width,
            "height": frame.height,
            "annotations": objects,
        }


def _check_layout(folder: Path) -> None:
    """Check that there are annotations and images somewhere below a folder.

    Raises:
        UserError: there are none, or the folder holds one in the kit's layout.
    """
    nested = [path.parent for path in sorted(folder.glob("*/Annotations")) if path.is_dir()]
    needs = "a VOC folder holds images and an XML file for each, such as JPEGImages and Annotations"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a VOC folder, as it does not exist ({needs})")
    if nested:
        raise UserError(f"{folder} is not a VOC folder ({needs}): did you mean {nested[0]}?")
    files = [path.lower() for _, path in files_below(folder)]
    for kind, found in (
        ("XML file", any(path.endswith(".xml") for path in files)),
        ("image", any(map(is_image, files))),
    ):
        if not found:
            raise UserError(f"{folder} is not a VOC folder, as it holds no {kind} ({needs})")


def _without_kinds(key: str) -> str:
    *folders, name = key.split("/")
    return "/".join([*(part for part in folders if part.lower() not in KINDS), name])


def _counted_from_zero(
    corners: tuple[float, ...] | None, report: DatasetReport, file: str, obj: str
) -> list[float] | None:
    """VOC's pixel corners (from 1, inclusive) as a box in coordinate space (from 0, exclusive).

    None where the corners are no box. Equal corners would be one pixel wide by the letter of the
    convention; in practice they are an accidental click, so they count as empty.
    """
    if corners is None:
        report.add("box unreadable", file, obj, action="object skipped")
        return None
    box = ordered_corners(corners, report=report, file=file, obj=obj)
    return box and [box[0] - 1.0, box[1] - 1.0, box[2], box[3]]


def _read_annotation(path: str, file: str) -> _Annotation | str:
    try:
        root = ET.fromstring(read_regular(path))
    except (ET.ParseError, OSError, ValueError, LookupError):  # LookupError: unknown encoding
        return "annotation unreadable"
    if root.tag.startswith("{"):  # a namespace
        for node in root.iter():
            node.tag = node.tag.rpartition("}")[2]
    if root.find("object") is None:  # tags in capitals, or objects in a list of their own
        for node in root.iter():
            node.tag = node.tag.lower() if isinstance(node.tag, str) else node.tag
    if root.tag.lower() != "annotation" and root.find("object") is None:
        tool = ", as in CVAT's own format" if root.tag == "annotations" else ""
        return f"annotation unreadable (its root is <{root.tag[:40]}>, not <annotation>{tool})"
    annotation = _Annotation(file, filename=(root.findtext("filename") or "").strip())
    width = read_number(root.findtext("size/width"))
    height = read_number(root.findtext("size/height"))
    if width and height and round(width) > 0 and round(height) > 0:
        annotation.size = (round(width), round(height))
    objects = root.findall("object") or root.findall(".//object")
    annotation.objects = [_read_object(obj) for obj in objects]
    return annotation


def _read_object(obj: ET.Element) -> _Object:
    # One pass over the children is several times faster than a findtext for each.
    parts = {child.tag: child for child in reversed(obj)}  # the first of several
    corners = _corners(parts.get("bndbox"))
    fault = ""
    if sum(child.tag == "bndbox" for child in obj) > 1:
        fault = "object with several boxes: the first taken"
    elif "bndbox" not in parts and (around := _box_around(parts)):
        corners, fault = around, "object without a box: taken around its outline"
    texts = {tag: part.text or "" for tag, part in parts.items()}
    difficult = read_flag(texts.get("difficult"))
    return _Object(texts.get("name", "").strip(), corners, difficult, fault)


def _corners(bndbox: ET.Element | None) -> tuple[float, ...] | None:
    if bndbox is None:
        return None
    box: dict[str, str | None] = {**bndbox.attrib}
    box |= {child.tag: child.text for child in reversed(bndbox)}
    read = [read_number(box.get(corner)) for corner in CORNERS]
    found = tuple(value for value in read if value is not None)
    return found if len(found) == 4 else None


def _box_around(parts: dict[str, ET.Element]) -> tuple[float, ...] | None:
    """The corners around a polygon (``x1``, ``y1``, ... or ``pt``) or a rotated box."""
    polygon, rotated = parts.get("polygon"), parts.get("robndbox")
    x: list[float | None] = []
    y: list[float | None] = []
    if polygon is not None:
        for node in polygon.iter():
            if node.tag[:1] in ("x", "y") and node.tag[1:].isdecimal() | (node.tag in ("x", "y")):
                (x if node.tag[0] == "x" else y).append(read_number(node.text))
    elif rotated is not None:
        names = ("cx", "cy", "w", "h", "angle")
        values = [read_number(rotated.findtext(name)) for name in names]
        known_values = [value for value in values if value is not None]
        if len(known_values) == 5:
            cx, cy, w, h, angle = known_values
            cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
            across, down = (w * cos + h * sin) / 2, (w * sin + h * cos) / 2
            x, y = [cx - across, cx + across], [cy - down, cy + down]
    known = [(a, b) for a, b in zip(x, y) if a is not None and b is not None]  # noqa: B905
    if len(known) < 2 or len(known) != len(x) or len(known) != len(y):
        return None
    xs, ys = zip(*known, strict=True)
    return min(xs), min(ys), max(xs), max(ys)

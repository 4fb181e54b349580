"""Reader of COCO annotation files and their image folders.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; the format is the COCO API's.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode

from moco_common.errors import UserError
from moco_common.files import read_json
from moco_common.text import counted
from moco_det.data.datasets.coco_keypoints import Skeleton, read_keypoints, read_skeleton
from moco_det.data.datasets.coco_masks import Mask, MaskError, mask_area, mask_box, read_mask
from moco_det.data.datasets.findings import DatasetReport, Finding
from moco_det.data.datasets.image_files import ImageFolder
from moco_det.data.datasets.image_frame import (
    Frame,
    ImageHeader,
    find_frame,
    mend_box,
    ordered_corners,
    read_headers,
)
from moco_det.data.datasets.units import check_corners, refuse_normalised
from moco_det.data.datasets.values import (
    are_numbers,
    is_whole,
    numbers_of,
    read_flag,
    read_id,
    whole_number,
)

Json = dict[str, Any]
# The keys by which files of annotation tools are known, of the file or of the first of its entries.
FOREIGN = (
    ("Labelbox", {"data_row"}),
    ("Labelbox", {"Labeled Data"}),
    ("LabelMe", {"shapes", "imagePath"}),
    ("VIA", {"_via_img_metadata"}),
    ("Label Studio", {"data", "annotations"}),
    ("Label Studio", {"data", "completions"}),
    ("Create ML", {"image", "annotations"}),
    ("Supervisely", {"objects", "size", "tags"}),
)
NAME_KEYS = ("file_name", "filename")  # the format's, and what some tools write


class _Object(NamedTuple):
    """One annotation: its label in the report, its class and the file's entry."""

    label: str
    class_name: str
    entry: Json


def read_coco(
    json_file: Path, image_folders: Sequence[Path], report: DatasetReport
) -> tuple[list[Json], list[str], Json]:
    """Read a COCO data set.

    Args:
        image_folders: of several, the one that holds the most of the named images is taken.

    Returns:
        Detectron2's dataset dicts, with class *names* under ``category_id``, and ``area`` (square
        pixels) in each annotation; the class names by category id; and the metadata
        ``category_ids`` (class name -> id in the file) and, with keypoints, ``keypoint_names``,
        ``keypoint_flip_map`` and ``keypoint_connection_rules``.

    Raises:
        UserError: the file is not a COCO annotation file, or its boxes are not
            [x, y, width, height] in pixels.
    """
    content = _load(json_file)
    file = json_file.name
    names, category_ids = _read_categories(content, json_file, report)
    images, aliases = _read_images(content["images"], json_file, image_folders, report)
    entries = [entry for entry in content["images"] if isinstance(entry, dict)]
    listed = {read_id(entry.get("id")) for entry in entries}
    _read_strings(content["annotations"], entries, listed, report)
    objects = _objects_by_image(
        content["annotations"],
        aliases=aliases,
        listed=listed,
        names=names,
        file=file,
        report=report,
    )
    skeleton = read_skeleton(content["categories"], content["annotations"], file, report)
    headers = read_headers([image["path"] for image in images.values()])
    _check_units(images, headers, objects, file=file, report=report)
    records = []
    for (key, image), header in zip(images.items(), headers, strict=True):
        record = _read_record(image, header, objects[key], skeleton=skeleton, report=report)
        if record is not None:
            records.append(record)
    classes = list(dict.fromkeys(names.values()))
    metadata: Json = {"category_ids": category_ids}
    if skeleton is not None:
        metadata |= skeleton.metadata()
    return records, classes, metadata


def _load(json_file: Path) -> Json:
    try:
        content: Json = read_json(json_file)
    except OSError as error:
        raise UserError(f"cannot read {json_file}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value, as in files of one JSON object a line
            raise UserError(
                f"{json_file} holds several JSON values, one a line (NDJSON), which is not read: "
                "export the data in COCO's format"
            ) from None
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{json_file} is not JSON: {error.msg} at {where}") from None
    except ValueError:  # not UTF-8, a number of 5,000 digits, endless nesting
        raise UserError(f"{json_file} is not JSON that can be read") from None
    tool = _foreign_format(content)
    if tool:
        raise UserError(
            f"{json_file} is in {tool}'s own format, which is not read: export it from there in "
            "COCO's format"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"{json_file} has no list '{key}': a COCO file for detection holds the lists "
                "images, annotations and categories"
            )
    return content


def _foreign_format(content: Any) -> str:
    """The annotation tool whose own format a JSON file is in; "" for COCO's and unknown ones."""
    first = content[0] if isinstance(content, list) and content else content
    if isinstance(content, dict) and "images" not in content:
        values = [value for value in content.values() if isinstance(value, dict)]
        if values and all("regions" in value and "filename" in value for value in values):
            return "VIA"
    keys = set(first) if isinstance(first, dict) else set()
    return next((tool for tool, marks in FOREIGN if keys.issuperset(marks)), "")


def _read_categories(
    content: Json, json_file: Path, report: DatasetReport
) -> tuple[dict[str, str], dict[str, int]]:
    """Category id -> class name, by ascending id, and class name -> the first id that has it.

    Ids that are not whole numbers are replaced by 1, 2, ... in the second.
    """
    kinds: dict[str, dict[str, None]] = defaultdict(dict)  # the supercategories under one name
    read: dict[str, tuple[str, str]] = {}
    for number, entry in enumerate(content["categories"], start=1):
        entry = entry if isinstance(entry, dict) else {}
        key, name = read_id(entry.get("id")), entry.get("name")
        name = name if isinstance(name, str) else read_id(name)  # classes named 1, 2, ...
        if key is None or not isinstance(name, str) or not name.strip():
            report.add(
                "category unreadable", json_file.name, f"category {number}", action="skipped"
            )
            continue
        entry_read = (name.strip(), str(entry.get("supercategory") or ""))
        if read.setdefault(key, entry_read) != entry_read:
            raise UserError(
                f"{json_file} gives the category id {key} twice, to '{read[key][0]}' and to "
                f"'{entry_read[0]}': give each category its own id"
            )
        kinds[entry_read[0]][entry_read[1]] = None
    _leave_out_root(read, content["annotations"], report)
    whole = all(map(is_whole, read))
    names: dict[str, str] = {}
    first_ids: dict[str, int] = {}
    for position, key in enumerate(sorted(read, key=int if whole else str), start=1):
        name, kind = read[key]
        if len(kinds[name]) > 1:  # a mouse is an animal or a device: two classes
            report.add(
                "category name twice", json_file.name, f"'{name}'", action="told apart by kind"
            )
            name = f"{name} ({kind})"
        elif name in first_ids:
            report.add("category name twice", json_file.name, f"'{name}'", action="made one class")
        names[key] = name
        first_ids.setdefault(name, int(key) if whole else position)
    return names, first_ids


def _leave_out_root(
    read: dict[str, tuple[str, str]], annotations: list[Any], report: DatasetReport
) -> None:
    """Leave out the category that Roboflow puts above all others: it has no object of its own."""
    for key, (name, kind) in list(read.items()):
        others = (other for index, (_, other) in read.items() if index != key)
        if kind == "none" and len(read) > 1 and all(other == name for other in others):
            used = any(
                isinstance(entry, dict) and read_id(entry.get("category_id")) == key
                for entry in annotations
            )
            if not used:
                del read[key]
                report.notes.append(
                    f"the category '{name}' (id {key}) has no object and is only the supercategory "
                    "of the others: left out of the classes"
                )
            return  # there is only one above all others


def _read_images(
    entries: list[Any], json_file: Path, folders: Sequence[Path], report: DatasetReport
) -> tuple[dict[str, Json], dict[str, str]]:
    """Image id -> entry with ``image_id`` and ``path``, by ascending id, without those that have
    no file; and the ids of entries that list the image of another one -> that one's."""
    read: dict[str, Json] = {}
    ambiguous: set[str] = set()  # ids of several files, whose objects could be of either
    file, other_key = json_file.name, 0
    for number, entry in enumerate(entries, start=1):
        entry = entry if isinstance(entry, dict) else {}
        key = read_id(entry.get("id"))
        names = [entry[name] for name in NAME_KEYS if isinstance(entry.get(name), str)]
        if key is None or not names or not names[0]:
            missing = "an id" if key is None else f"a name under '{NAME_KEYS[0]}'"
            kind = "image entry unreadable"
            report.add(kind, file, f"image {number} (it lacks {missing})", action="image skipped")
            continue
        other_key += NAME_KEYS[0] not in entry
        if key in read:
            report.add("image id twice", file, f"image {number} (id {key})", action="image skipped")
            if names[0] != read[key]["file_name"]:
                ambiguous.add(key)
            continue
        read[key] = {**entry, "image_id": entry["id"], "file_name": names[0]}
    for key in sorted(ambiguous):
        where = f"the first image of the id {key}, as its objects may be of either"
        report.add("image id twice", file, where, action="image skipped")
        del read[key]
    if other_key:
        report.add(f"images named under '{NAME_KEYS[1]}'", file, action="read as 'file_name'")
    folder = _fullest(folders, [image["file_name"] for image in read.values()], json_file)
    finder = ImageFolder(folder, around=(folder.parent, json_file.parent))
    paths = finder.find([image["file_name"] for image in read.values()], report)

    aliases: dict[str, str] = {}
    first: dict[str, str] = {}  # path -> id
    images: dict[str, Json] = {}
    for (key, image), path in zip(read.items(), paths, strict=True):
        if path is None:
            continue
        aliases[key] = first.setdefault(os.path.normpath(path.absolute()), key)
        if aliases[key] == key:
            images[key] = {**image, "path": path.absolute()}
        elif _size(image) == _size(images[aliases[key]]):
            where = f"ids {aliases[key]} and {key}"
            report.add("image listed twice", image["file_name"], where, action="made one image")
        else:
            del aliases[key]
            where = f"id {key}, with another size"
            report.add("image listed twice", image["file_name"], where, action="image skipped")
    # The COCO API sorts ids, so they must be of one type.
    whole = all(whole_number(image["image_id"]) is not None for image in images.values())
    for key, image in images.items():
        image["image_id"] = int(key) if whole else key
    return {k: images[k] for k in sorted(images, key=int if whole else str)}, aliases


def _fullest(folders: Sequence[Path], names: list[str], json_file: Path) -> Path:
    """The folder that holds the most of some images.

    Raises:
        UserError: none of the folders exists.
    """
    there = [folder for folder in folders if folder.is_dir()]
    if not there:
        near = ImageFolder(folders[0], around=(json_file.parent,)).nearest(
            names[0] if names else ""
        )
        hint = f": the nearest image is {near}" if near else ""
        raise UserError(f"the image folder {folders[0]} of {json_file} does not exist{hint}")
    if len(there) == 1:
        return there[0]
    sample = names[:: max(1, len(names) // 50)]
    return max(there, key=lambda f: sum(os.path.isfile(os.path.join(f, n)) for n in sample))


def _read_strings(
    annotations: list[Any], images: list[Json], listed: set[str | None], report: DatasetReport
) -> None:
    """Replace, in place, boxes written as strings by numbers, and a file name under ``image_id`` by
    the id of the only image with this name."""
    ids: dict[str, list[Any]] = defaultdict(list)
    for image in images:
        name = next((image[key] for key in NAME_KEYS if isinstance(image.get(key), str)), "")
        ids[name].append(image.get("id"))
    boxes = names = 0
    for entry in annotations:
        if not isinstance(entry, dict):
            continue
        box, image_id = numbers_of(entry.get("bbox")), entry.get("image_id")
        if box is not entry.get("bbox"):
            entry["bbox"] = box
            boxes += 1
        same = ids.get(image_id, []) if isinstance(image_id, str) else []
        if len(same) == 1 and read_id(image_id) not in listed:
            (entry["image_id"],) = same
            names += 1
    if boxes:
        report.notes.append(f"{counted(boxes, 'box', ',')} written as strings: read as numbers")
    if names:
        found = counted(names, "annotation", ",")
        report.notes.append(f"image_id holds a file name in {found}: taken as that image's id")


def _objects_by_image(
    entries: list[Any],
    *,
    aliases: dict[str, str],
    listed: set[str | None],
    names: dict[str, str],
    file: str,
    report: DatasetReport,
) -> dict[str, list[_Object]]:
    """Image id -> its annotations.

    Args:
        aliases: image id -> id of the image that its objects belong to.
        listed: all ids in the file's list of images, usable or not.
        names: category id -> class name.
    """
    objects: dict[str, list[_Object]] = defaultdict(list)
    for number, entry in enumerate(entries, start=1):
        entry = entry if isinstance(entry, dict) else {}
        image_id, category = read_id(entry.get("image_id")), read_id(entry.get("category_id"))
        obj = f"annotation {entry.get('id', f'number {number}')}"
        if image_id is None or category is None:
            report.add("annotation unreadable", file, obj, action="object skipped")
        elif category not in names:
            kind = f"category id {category} not in the list of categories"
            report.add(kind, file, obj, action="object skipped")
        elif image_id not in listed:
            kind = "annotation of an image that is not listed"
            report.add(kind, file, f"{obj} (image id {image_id})", action="object skipped")
        elif (key := aliases.get(image_id)) is None:
            report.add("annotation without a usable image", file, obj, action="object skipped")
        else:
            objects[key].append(_Object(f"{obj} ({names[category]})", names[category], entry))
    return objects


def _each_once(objects: list[_Object], file: str, report: DatasetReport) -> Iterator[_Object]:
    """The objects of one image without those that are in all the same as an earlier one."""
    seen: dict[tuple[Any, ...], list[_Object]] = defaultdict(list)
    for found in objects:
        if are_numbers(found.entry.get("bbox"), 4):
            same = seen[(read_id(found.entry["category_id"]), *found.entry["bbox"])]
            if any(_alike(found.entry, other.entry) for other in same):
                report.add("object listed twice", file, found.label, action="taken once")
                continue
            same.append(found)
        yield found


def _alike(entry: Json, other: Json) -> bool:
    """True if two objects of one class and one box are the same in all but id and area."""
    keys = (entry.keys() | other.keys()) - {"id", "image_id", "area"}
    return all(entry.get(key) == other.get(key) for key in keys)


def _check_units(
    images: dict[str, Json],
    headers: Sequence[ImageHeader | str],
    objects: dict[str, list[_Object]],
    *,
    file: str,
    report: DatasetReport,
) -> None:
    """Check that boxes are pixels, as [x, y, width, height]."""
    boxes, sizes = [], []
    for (key, image), header in zip(images.items(), headers, strict=True):
        if isinstance(header, ImageHeader):
            size = _size(image) or header.shown
            for found in objects[key]:
                if are_numbers(found.entry.get("bbox"), 4):
                    boxes.append(found.entry["bbox"])
                    sizes.append(size)
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    refuse_normalised(array, report.spec, "pixels")
    check_corners(array, np.array(sizes).reshape(-1, 2), report.spec, file, report)


def _size(entry: Json) -> tuple[int, int] | None:
    width, height = whole_number(entry.get("width")), whole_number(entry.get("height"))
    if width and height and 0 < width < 1e9 and 0 < height < 1e9:
        return width, height
    return None


def _read_record(
    image: Json,
    header: ImageHeader | str,
    objects: list[_Object],
    *,
    skeleton: Skeleton | None,
    report: DatasetReport,
) -> Json | None:
    file = image["file_name"]
    if isinstance(header, str):
        report.add(header, file, action="image skipped")
        return None
    boxes = [o.entry["bbox"] for o in objects if are_numbers(o.entry.get("bbox"), 4)]
    corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    frame = find_frame(header, _size(image), corners, report=report, file=file)
    if frame is None:
        return None
    annotations = [
        _read_object(found, frame, skeleton=skeleton, report=report, file=file)
        for found in _each_once(objects, file, report)
    ]
    return {
        "file_name": str(image["path"]),
        "image_id": image["image_id"],
        "width": frame.width,
        "height": frame.height,
        "annotations": [annotation for annotation in annotations if annotation is not None],
    }


def _read_object(
    found: _Object,
    frame: Frame,
    *,
    skeleton: Skeleton | None,
    report: DatasetReport,
    file: str,
) -> Json | None:
    """One object as Detectron2's annotation, or None where it cannot be used.

    Args:
        skeleton: the keypoints to read, if any.
    """
    obj, class_name, entry = found
    mask: Mask | None = None
    fault: Finding | None = None
    if entry.get("segmentation"):
        try:
            mask, dropped = read_mask(entry["segmentation"], entry.get("bbox"), frame)
        except MaskError as error:
            fault = Finding(f"mask unreadable: {error}", file, obj, "object skipped")
        else:
            if dropped:
                kind = "polygon of fewer than three points"
                fault = Finding(kind, file, obj, "left out of the object's mask")
    if are_numbers(entry.get("bbox"), 4):
        x, y, w, h = entry["bbox"]
        stated = ordered_corners([x, y, x + w, y + h], report=report, file=file, obj=obj)
        box = stated and mend_box(frame.box(stated), frame, report=report, file=file, obj=obj)
    elif mask is not None and not entry.get("bbox"):
        report.add("box missing", file, obj, action="taken from its mask")
        box = mend_box(mask_box(mask, frame), frame, report=report, file=file, obj=obj)
    else:
        report.add("box unreadable", file, obj, action="object skipped")
        return None
    if not box:
        return None
    crowd = read_flag(entry.get("iscrowd") or 0)
    if crowd is None:
        report.add("iscrowd unreadable", file, obj, action="taken as 0")
    if read_flag(entry.get("ignore") or 0) and not crowd:
        report.add("object marked 'ignore'", file, obj, action="treated as a crowd: not counted")
        crowd = True
    annotation: Json = {
        "category_id": class_name,
        "bbox": box,
        "bbox_mode": BoxMode.XYXY_ABS,
        "iscrowd": int(bool(crowd)),
    }
    if fault is not None:
        annotation["mask_finding"] = fault
    if mask is not None:
        annotation["segmentation"] = mask
    if skeleton is not None:
        count = len(skeleton.names)
        annotation["keypoints"] = read_keypoints(
            entry, count, frame, report=report, file=file, obj=obj
        )
    # The file's own area decides between small, medium and large, unless the object was scaled.
    if frame.matrix is None and are_numbers([entry.get("area")], 1) and entry["area"] > 0:
        annotation["area"] = float(entry["area"])
    elif mask is not None:
        annotation["area"] = mask_area(mask)
    else:
        annotation["area"] = (box[2] - box[0]) * (box[3] - box[1])
    return annotation

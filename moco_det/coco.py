"""Reads a COCO annotation file with its image folder.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; the format is the COCO API's.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, TypeGuard

from moco_det.checks import DatasetReport, find_frame
from moco_det.coco_objects import are_numbers, read_object, unify_masks
from moco_det.errors import UserError
from moco_det.headers import ImageHeader, read_headers
from moco_det.keypoints import Skeleton, read_skeleton

Json = dict[str, Any]


def read_coco(
    json_file: Path, image_folder: Path, report: DatasetReport
) -> tuple[list[Json], list[str], Json]:
    """Read a COCO data set.

    Returns:
        Detectron2's dataset dicts, with class *names* under ``category_id``, and ``area`` (square
        pixels) in each annotation; the class names by category id; and the metadata
        ``has_masks``, ``mask_format``, ``category_ids`` (class name -> id in the file) and, of
        keypoints, ``keypoint_names``, ``keypoint_flip_map`` and ``keypoint_connection_rules``.

    Raises:
        UserError: if the file is no COCO annotation file or the folder is not there.
    """
    content = _load(json_file)
    if not image_folder.is_dir():
        raise UserError(f"the image folder {image_folder} of {json_file} does not exist")
    file = json_file.name
    names, category_ids = _read_categories(content["categories"], json_file, report)
    images = _read_images(content["images"], file, image_folder, report)
    objects = _objects_by_image(content["annotations"], images, names, file, report)
    skeleton = read_skeleton(content["categories"], content["annotations"], file, report)

    headers = read_headers([image["path"] for image in images.values()])
    records = []
    for (image_id, image), header in zip(images.items(), headers, strict=True):
        record = _read_record(image_id, image, header, objects[image_id], names, skeleton, report)
        if record is not None:
            records.append(record)
    classes = list(dict.fromkeys(names[key] for key in sorted(names)))
    metadata = unify_masks(records, report) | {"category_ids": category_ids}
    if skeleton is not None:
        metadata |= skeleton.metadata()
    return records, classes, metadata


def _load(json_file: Path) -> Json:
    try:
        content: Json = json.loads(json_file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {json_file}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{json_file} is not JSON: {error.msg} at {where}") from None
    except (ValueError, RecursionError):  # not UTF-8, a number of 5,000 digits, endless nesting
        raise UserError(f"{json_file} is not JSON that can be read") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"{json_file} has no list '{key}': a COCO file for detection holds the lists "
                "images, annotations and categories"
            )
    return content


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_categories(
    entries: list[Any], json_file: Path, report: DatasetReport
) -> tuple[dict[int, str], dict[str, int]]:
    """Category id -> class name, and class name -> the first id that has it."""
    kinds: dict[str, dict[str, None]] = defaultdict(dict)  # the supercategories under one name
    read: dict[int, tuple[str, str]] = {}
    for number, entry in enumerate(entries, start=1):
        entry = entry if isinstance(entry, dict) else {}
        key, name = entry.get("id"), entry.get("name")
        if not _is_id(key) or not isinstance(name, str) or not name.strip():
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
    names: dict[int, str] = {}
    first_ids: dict[str, int] = {}
    for key in sorted(read):
        name, kind = read[key]
        if len(kinds[name]) > 1:  # a mouse is an animal and a device: two classes, not one
            report.add(
                "category name twice", json_file.name, f"'{name}'", action="told apart by kind"
            )
            name = f"{name} ({kind})"
        elif name in first_ids:
            report.add("category name twice", json_file.name, f"'{name}'", action="made one class")
        names[key] = name
        first_ids.setdefault(name, key)
    return names, first_ids


def _read_images(
    entries: list[Any], file: str, folder: Path, report: DatasetReport
) -> dict[int | str, Json]:
    """Image id -> entry with ``path``, by ascending id, without those that have no file."""
    found: dict[str, list[Path]] | None = None  # files by bare name, listed when first needed
    images: dict[int | str, Json] = {}
    for number, entry in enumerate(entries, start=1):
        entry = entry if isinstance(entry, dict) else {}
        key, name = entry.get("id"), entry.get("file_name")
        if not (_is_id(key) or isinstance(key, str)) or not isinstance(name, str) or not name:
            report.add("image entry unreadable", file, f"image {number}", action="image skipped")
            continue
        if key in images:
            report.add("image id twice", file, f"image {number} (id {key})", action="image skipped")
            continue
        path = folder / name
        if "\0" in name or not path.is_file():
            if found is None:
                found = defaultdict(list)
                for root, _, files in os.walk(folder):
                    for bare in files:
                        found[bare].append(Path(root, bare))
            candidates = found.get(name.replace("\\", "/").rpartition("/")[2], [])
            if len(candidates) != 1:
                report.add("image missing", name, action="image skipped")
                continue
            path = candidates[0]
            report.add("image in another folder", name, action="found by its name")
        images[key] = {**entry, "path": path.absolute()}
    if all(_is_id(key) for key in images):
        return dict(sorted(images.items()))
    # The COCO API sorts ids, so they must be of one type.
    return {str(key): images[key] for key in sorted(images, key=str)}


def _objects_by_image(
    entries: list[Any],
    images: dict[int | str, Json],
    names: dict[int, str],
    file: str,
    report: DatasetReport,
) -> dict[int | str, list[tuple[str, Json]]]:
    """Image id -> (name for the report, entry) of its annotations."""
    as_text = any(isinstance(key, str) for key in images)
    objects: dict[int | str, list[tuple[str, Json]]] = defaultdict(list)
    for number, entry in enumerate(entries, start=1):
        entry = entry if isinstance(entry, dict) else {}
        image_id, category = entry.get("image_id"), entry.get("category_id")
        obj = f"annotation {entry.get('id', f'number {number}')}"
        if not (_is_id(image_id) or isinstance(image_id, str)) or not _is_id(category):
            report.add("annotation unreadable", file, obj, action="object skipped")
        elif category not in names:
            kind = f"category id {category} not in the list of categories"
            report.add(kind, file, obj, action="object skipped")
        elif (image_id := str(image_id) if as_text else image_id) not in images:
            report.add("annotation without a usable image", file, obj, action="object skipped")
        else:
            objects[image_id].append((f"{obj} ({names[category]})", entry))
    return objects


def _size(entry: Json) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    if _is_id(width) and _is_id(height) and 0 < width < 1e9 and 0 < height < 1e9:
        return width, height
    return None


def _read_record(
    image_id: int | str,
    image: Json,
    header: ImageHeader | str,
    objects: list[tuple[str, Json]],
    names: dict[int, str],
    skeleton: Skeleton | None,
    report: DatasetReport,
) -> Json | None:
    file = image["file_name"]
    if isinstance(header, str):
        report.add(header, file, action="image skipped")
        return None
    boxes = [entry["bbox"] for _, entry in objects if are_numbers(entry.get("bbox"), 4)]
    corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    frame = find_frame(header, _size(image), corners, report, file)
    if frame is None:
        return None
    annotations = [
        read_object(obj, entry, frame, names, skeleton, report, file) for obj, entry in objects
    ]
    return {
        "file_name": str(image["path"]),
        "image_id": image_id,
        "width": frame.width,
        "height": frame.height,
        "annotations": [annotation for annotation in annotations if annotation is not None],
    }

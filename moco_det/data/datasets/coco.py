"""Reader of COCO annotation files and their image folders.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; the format is the COCO API's.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, TypeGuard

from detectron2.structures import BoxMode

from moco_common.errors import UserError
from moco_det.data.datasets.coco_keypoints import Skeleton, read_keypoints, read_skeleton
from moco_det.data.datasets.coco_masks import (
    Mask,
    MaskError,
    mask_area,
    mask_box,
    read_mask,
    to_rle,
)
from moco_det.data.datasets.findings import DatasetReport
from moco_det.data.datasets.image_frame import (
    Frame,
    ImageHeader,
    find_frame,
    mend_box,
    read_headers,
)

Json = dict[str, Any]


def read_coco(
    json_file: Path, image_folder: Path, report: DatasetReport
) -> tuple[list[Json], list[str], Json]:
    """Read a COCO data set.

    Returns:
        Detectron2's dataset dicts, with class *names* under ``category_id``, and ``area`` (square
        pixels) in each annotation; the class names by category id; and the metadata
        ``has_masks``, ``mask_format``, ``category_ids`` (class name -> id in the file) and, with
        keypoints, ``keypoint_names``, ``keypoint_flip_map`` and ``keypoint_connection_rules``.

    Raises:
        UserError: the file is not a COCO annotation file, or the folder does not exist.
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
        if len(kinds[name]) > 1:  # a mouse is an animal or a device: two classes
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


def are_numbers(value: Any, count: int) -> bool:
    """Whether ``value`` is a list of ``count`` finite numbers."""
    if not isinstance(value, list) or len(value) != count:
        return False
    for number in value:  # a plain loop: this is called for every object
        if not isinstance(number, (int, float)) or not abs(number) < 1e9:  # also if NaN
            return False
    return True


def read_object(
    obj: str,
    entry: Json,
    frame: Frame,
    names: dict[int, str],
    skeleton: Skeleton | None,
    report: DatasetReport,
    file: str,
) -> Json | None:
    """One object as Detectron2's annotation, or None where it cannot be used.

    Args:
        obj: the name of the object in the report, under ``file``.
        names: category id -> class name, which goes under ``category_id``.
        skeleton: the keypoints to read, if any.
    """
    mask: Mask | None = None
    if entry.get("segmentation"):
        try:
            mask, dropped = read_mask(entry["segmentation"], frame)
        except MaskError as error:
            report.add(f"mask unreadable: {error}", file, obj, action="object skipped")
            return None
        if dropped:
            kind = "polygon of fewer than three points"
            report.add(kind, file, obj, action="left out of the object's mask")
    if are_numbers(entry.get("bbox"), 4):
        x, y, w, h = entry["bbox"]
        box = mend_box(frame.box([x, y, x + w, y + h]), frame, report, file, obj)
    elif mask is not None and not entry.get("bbox"):
        report.add("box missing", file, obj, action="taken from its mask")
        box = mend_box(mask_box(mask, frame), frame, report, file, obj)
    else:
        report.add("box unreadable", file, obj, action="object skipped")
        return None
    if box is None:
        return None
    crowd = entry.get("iscrowd", 0) in (1, True)
    if entry.get("ignore") and not crowd:
        report.add("object marked 'ignore'", file, obj, action="treated as a crowd: not counted")
        crowd = True
    annotation: Json = {
        "category_id": names[entry["category_id"]],
        "bbox": box,
        "bbox_mode": BoxMode.XYXY_ABS,
        "iscrowd": int(crowd),
    }
    if mask is not None:
        annotation["segmentation"] = mask
    if skeleton is not None:
        count = len(skeleton.names)
        annotation["keypoints"] = read_keypoints(entry, count, frame, report, file, obj)
    # The file's own area decides between small, medium and large, unless the object was scaled.
    if frame.matrix is None and are_numbers([entry.get("area")], 1) and entry["area"] > 0:
        annotation["area"] = float(entry["area"])
    elif mask is not None:
        annotation["area"] = mask_area(mask)
    else:
        annotation["area"] = (box[2] - box[0]) * (box[3] - box[1])
    return annotation


def unify_masks(records: list[Json], report: DatasetReport) -> Json:
    """Bring all masks into one form. The minority goes: objects without a mask in a data set of
    masks, or the masks in a data set of boxes."""
    annotations = [item for record in records for item in record["annotations"]]
    masked = sum("segmentation" in item for item in annotations)
    has_masks = masked > 0 and 2 * masked >= len(annotations)
    for record in records:
        if not has_masks:
            for item in record["annotations"]:
                if item.pop("segmentation", None) is not None:
                    action = "mask ignored"
                    report.add("mask in a data set of boxes", record["file_name"], action=action)
            continue
        complete = [item for item in record["annotations"] if "segmentation" in item]
        for item in record["annotations"]:
            if "segmentation" not in item:
                obj = f"{item['category_id']} at {[round(v) for v in item['bbox']]}"
                kind = "object without a mask in a data set of masks"
                report.add(kind, record["file_name"], obj, action="object skipped")
        record["annotations"] = complete
    # Crowds do not count: they are RLE in COCO itself, and never trained on.
    kinds = {
        type(item["segmentation"])
        for record in records
        for item in record["annotations"]
        if has_masks and not item["iscrowd"]
    }
    if dict not in kinds:
        return {"has_masks": has_masks, "mask_format": "polygon"}
    for record in records:
        for item in record["annotations"]:
            item["segmentation"] = to_rle(item["segmentation"], record["height"], record["width"])
    return {"has_masks": True, "mask_format": "bitmask"}

"""The objects of a COCO file: boxes, masks and keypoints, each checked on its own."""

from __future__ import annotations

from typing import Any

from detectron2.structures import BoxMode

from moco_det.checks import DatasetReport, Frame, mend_box
from moco_det.keypoints import Skeleton, read_keypoints
from moco_det.masks import Mask, MaskError, mask_area, mask_box, read_mask, to_rle

Json = dict[str, Any]


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
        obj: its name for the report, under ``file``.
        names: category id -> class name, which goes under ``category_id``.
        skeleton: of the keypoints to read, if any.
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
    """Make all masks of one kind; objects without one among masks, or masks among boxes, go."""
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
    # Crowds are RLE in COCO itself and never trained on: they do not decide.
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

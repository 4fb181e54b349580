"""Instance masks as annotation files hold them: polygons, or run lengths (RLE) in COCO's form.

A mask here is a list of polygons ``[x0, y0, x1, y1, ...]`` (pixels, float) or a compressed RLE
``{"size": [height, width], "counts": str}``, both as in the COCO API.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from moco_det.data.datasets.findings import DatasetReport
from moco_det.data.datasets.image_frame import Frame
from moco_det.data.datasets.values import are_numbers, read_number

Mask = list[list[float]] | dict[str, Any]


class MaskError(Exception):
    """A mask cannot be read; the message is the reason, in a few words."""


def read_mask(segmentation: Any, box: Any, frame: Frame) -> tuple[Mask, int]:
    """Check a COCO ``segmentation`` and bring it into the frame the image is read in.

    Polygons may also be lists of [x, y] points, and an RLE or several, which are joined, may stand
    in a list. Four numbers are a rectangle if they are the object's box.

    Args:
        box: the object's box as the file holds it.

    Returns:
        The mask, and how many invalid polygons were left out of it.

    Raises:
        MaskError: no part of it can be used.
    """
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, frame), 0
    if not isinstance(segmentation, list):
        raise MaskError("neither polygons nor RLE")
    if segmentation and all(isinstance(part, dict) for part in segmentation):
        parts = [_read_rle(part, frame) for part in segmentation]
        return (_as_text(coco_mask.merge(parts)) if len(parts) > 1 else parts[0]), 0
    if segmentation and isinstance(segmentation[0], (int, float)):
        segmentation = [segmentation]  # one polygon without its list
    elif len(segmentation) > 2 and all(are_numbers(point, 2) for point in segmentation):
        segmentation = [segmentation]  # the points of one polygon
    polygons = []
    for polygon in segmentation:
        try:
            points = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise MaskError("a polygon is no list of numbers") from None
        if points.ndim == 2 and points.shape[1] == 2:
            points = points.reshape(-1)
        if points.ndim != 1 or not np.abs(points).max(initial=0) < 1e9:  # also if NaN
            raise MaskError("a polygon is no list of numbers")
        if len(points) == 4:
            points = _rectangle(points, box)
        if len(points) >= 6 and len(points) % 2 == 0:
            if frame.matrix is not None:
                points = frame.points(points.reshape(-1, 2)).reshape(-1)
            polygons.append(points.tolist())
    if not polygons:
        raise MaskError("no polygon of three points")
    if mask_area(polygons) == 0:
        raise MaskError("empty")
    return polygons, len(segmentation) - len(polygons)


def _rectangle(numbers: np.ndarray, box: Any) -> np.ndarray:
    """The polygon of the object's box if the numbers are its corners or its [x, y, w, h]."""
    if not are_numbers(box, 4):
        return numbers
    x, y, w, h = box
    near = (np.abs(numbers - form).max() <= 1 for form in ((x, y, x + w, y + h), (x, y, w, h)))
    if not any(near):
        return numbers
    return np.array([x, y, x + w, y, x + w, y + h, x, y + h], dtype=np.float64)


def _read_rle(rle: dict[str, Any], frame: Frame) -> Mask:
    size, counts = rle.get("size"), rle.get("counts")
    if isinstance(size, list):
        size = [read_number(side) if isinstance(side, str) else side for side in size]
    turned = frame.matrix is not None and frame.matrix[0, 0] == 0
    if frame.matrix is not None and not turned:
        raise MaskError("RLE of another size than the image")
    expected = [frame.width, frame.height] if turned else [frame.height, frame.width]
    if size != expected:
        raise MaskError("RLE of another size than the image")
    size = expected  # equal, and whole numbers for sure
    runs = _decode_counts(counts)
    # pycocotools does not check that the runs stay within the image: sum them first.
    if len(runs) == 0 or runs.min() < 0 or runs.sum() != size[0] * size[1]:
        raise MaskError("RLE that does not add up to the image")
    if runs[1::2].sum() == 0:
        raise MaskError("empty")
    if isinstance(counts, list):
        rle = coco_mask.frPyObjects({"size": size, "counts": runs.tolist()}, *size)
    else:
        rle = {"size": size, "counts": counts}
    if turned:
        rle = coco_mask.encode(_turn(coco_mask.decode(rle), frame))
    return _as_text(rle)


def _turn(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    """Apply the frame's matrix, a quarter turn that may be mirrored, to an (H, W) array."""
    assert frame.matrix is not None
    turned = pixels.T
    if frame.matrix[0, 1] < 0:
        turned = turned[:, ::-1]
    if frame.matrix[1, 0] < 0:
        turned = turned[::-1]
    return np.asfortranarray(turned)


def _as_text(rle: Any) -> dict[str, Any]:
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": text}


def _decode_counts(counts: Any) -> np.ndarray:
    """Run lengths, int64, of a COCO RLE.

    The compressed form (pycocotools, maskApi.c, rleToString) is a variable-length code of 5 bits a
    character from chr(48) on, bit 5 saying that more follow, bit 4 of the last being the sign;
    from the fourth run on it holds the difference to the run two before.
    """
    if isinstance(counts, list):
        if not all(isinstance(run, int) and 0 <= run < 2**31 for run in counts):
            raise MaskError("RLE of another kind than whole numbers")
        return np.asarray(counts, dtype=np.int64)
    if not isinstance(counts, str):
        raise MaskError("RLE without counts")
    code = np.frombuffer(counts.encode("utf-8"), dtype=np.uint8).astype(np.int64) - 48
    if len(code) == 0 or code.min() < 0 or code.max() > 63 or code[-1] & 0x20:
        raise MaskError("RLE that is cut off or damaged")
    last = (code & 0x20) == 0
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    ends = np.flatnonzero(last)
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise MaskError("RLE that is cut off or damaged")
    place = np.arange(len(code)) - np.repeat(starts, lengths)
    values = np.add.reduceat((code & 0x1F) << (5 * place), starts)
    values -= np.where(code[ends] & 0x10, np.int64(1) << (5 * lengths), 0)
    # Undo the differences: odd and even runs each are a running sum, the first run stands alone.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def mask_area(mask: Mask) -> float:
    """Square pixels: of the shape for polygons (overlaps count twice), of the pixels for RLE."""
    if isinstance(mask, dict):
        return float(coco_mask.area(mask))
    area = 0.0
    for polygon in mask:
        points = np.asarray(polygon, dtype=np.float64)
        x, y = points[0::2], points[1::2]
        twice = x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0]
        area += 0.5 * abs(float(twice))
    return area


def mask_box(mask: Mask, frame: Frame) -> list[float]:
    """The box (x0, y0, x1, y1) around a mask."""
    if isinstance(mask, dict):
        x, y, w, h = coco_mask.toBbox(mask).tolist()
        return [x, y, x + w, y + h]
    x = np.concatenate([polygon[0::2] for polygon in mask])
    y = np.concatenate([polygon[1::2] for polygon in mask])
    box = [x.min(), y.min(), x.max(), y.max()]
    limits = [frame.width, frame.height] * 2
    return [float(min(max(v, 0.0), limit)) for v, limit in zip(box, limits, strict=True)]


def to_rle(mask: Mask, height: int, width: int) -> dict[str, Any]:
    """A mask as compressed RLE; polygons are drawn and joined as the COCO API does."""
    if isinstance(mask, dict):
        return mask
    return _as_text(coco_mask.merge(coco_mask.frPyObjects(mask, height, width)))


def settle_masks(
    records: list[dict[str, Any]], report: DatasetReport, *, wanted: bool
) -> dict[str, Any]:
    """Bring the masks of a data set into one form, in place.

    Masks are judged only where they are wanted: without, all objects are kept. With, the minority
    goes: objects without a mask in a data set of masks, or the masks in a data set of boxes.

    Args:
        records: their annotations hold ``segmentation`` and, where the mask has a fault,
            ``mask_finding``.

    Returns:
        The metadata ``has_masks`` and ``mask_format`` ("polygon" | "bitmask").
    """
    annotations = [item for record in records for item in record["annotations"]]
    findings = {id(item): item.pop("mask_finding", None) for item in annotations}
    meant = sum("segmentation" in i or findings[id(i)] is not None for i in annotations)
    some = any("segmentation" in item for item in annotations)
    has_masks = wanted and some and 2 * meant >= len(annotations)
    if not has_masks:
        for record in records:
            for item in record["annotations"]:
                masked, finding = item.pop("segmentation", None) is not None, findings[id(item)]
                if wanted and (masked or finding is not None):
                    kind = finding.kind if finding else "mask in a data set of boxes"
                    report.add(kind, record["file_name"], action="mask ignored")
        return {"has_masks": False, "mask_format": "polygon"}
    for record in records:
        for item in record["annotations"]:
            finding = findings[id(item)]
            if finding is not None:
                report.findings.append(finding)
            elif "segmentation" not in item:
                obj = f"{item['category_id']} at {[round(v) for v in item['bbox']]}"
                kind = "object without a mask in a data set of masks"
                report.add(kind, record["file_name"], obj, action="object skipped")
        record["annotations"] = [i for i in record["annotations"] if "segmentation" in i]
    # Crowds do not count: they are RLE in COCO itself, and never trained on.
    kinds = {
        type(item["segmentation"])
        for record in records
        for item in record["annotations"]
        if not item["iscrowd"]
    }
    if dict not in kinds:
        return {"has_masks": True, "mask_format": "polygon"}
    for record in records:
        for item in record["annotations"]:
            item["segmentation"] = to_rle(item["segmentation"], record["height"], record["width"])
    return {"has_masks": True, "mask_format": "bitmask"}

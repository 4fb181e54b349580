"""PASCAL VOC average precision: one pass over all classes and IoU thresholds, in NumPy.

The metric is the development kit's (Everingham et al., "The PASCAL Visual Object Classes (VOC)
Challenge", IJCV 2010, section 4.2), in the form of Detectron2's ``PascalVOCDetectionEvaluator``,
to the last bit: the same rounding of detections, order among equal scores, +1 pixel and strict
inequality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = tuple(percent / 100.0 for percent in range(50, 100, 5))
METRICS = ("11-point", "all-point")


@dataclass(frozen=True)
class GroundTruth:
    """All objects of a data set, N of them.

    ``image`` (N,) int64 and ``label`` (N,) int64 are indices; ``boxes`` (N, 4) float64 are corners
    (x0, y0, x1, y1), both inside the box; ``difficult`` (N,) bool marks objects that count neither
    when found nor when missed.
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    difficult: np.ndarray


@dataclass(frozen=True)
class Detections:
    """All detections, M of them, in the order that decides among equal scores.

    ``image`` (M,) int64, ``label`` (M,) int64, ``boxes`` (M, 4) float64 as in
    :class:`GroundTruth`, ``scores`` (M,) float64.
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def as_printed(values: np.ndarray, digits: int) -> np.ndarray:
    """``float(f"{value:.{digits}f}")`` of each value, float64.

    The product of a float of 24 bits or fewer and 10 ** digits is exact in float64, so ``rint``
    meets the same ties as the decimal conversion and rounds them in the same way (to even).
    """
    if values.dtype == np.float64:  # the product may round onto a tie: convert through text
        flat = [float(f"{value:.{digits}f}") for value in values.ravel().tolist()]
        return np.asarray(flat, dtype=np.float64).reshape(values.shape)
    scale = 10.0**digits
    return np.rint(values.astype(np.float64) * scale) / scale


def to_voc_corners(boxes: np.ndarray) -> np.ndarray:
    """Predicted boxes (M, 4), counted from 0, as VOC corners with one decimal, float64.

    Detectron2 adds 1 to NumPy scalars of the boxes' own type: NumPy 2 keeps float32, NumPy 1
    gives float64. The sum of a float32 and 1 needs no more than float64's bits to be exact here.
    """
    corners = boxes.copy()
    if type(boxes.dtype.type(0) + 1) is boxes.dtype.type:
        corners[:, :2] += 1
        return as_printed(corners, 1)
    printed = as_printed(corners, 1)
    sums = boxes[:, :2].astype(np.float64) + 1
    printed[:, :2] = np.rint(sums * 10.0) / 10.0
    return printed


def average_precisions(
    truth: GroundTruth,
    detections: Detections,
    num_classes: int,
    *,
    metric: str,
    thresholds: Sequence[float] = THRESHOLDS,
) -> np.ndarray:
    """Average precision of each class at each IoU threshold.

    Args:
        truth: the objects to find.
        detections: the detections; labels in [0, num_classes).
        num_classes: C.
        metric: "11-point" (VOC 2007) or "all-point" (the area under the curve, VOC 2010 on).
        thresholds: T values; a detection matches if its IoU is strictly greater.

    Returns:
        (T, C) float64 in [0, 1]. A class without a countable object gets what Detectron2 gives: 0
        by 11-point or without detections, NaN by all-point with detections.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    overlap, match = best_matches(truth, detections, num_classes)
    positives = np.bincount(truth.label[~truth.difficult], minlength=num_classes)
    by_class = np.argsort(detections.label, kind="stable")
    ends = np.cumsum(np.bincount(detections.label, minlength=num_classes))
    precisions = np.zeros((len(thresholds), num_classes))
    for label in range(num_classes):
        own = by_class[ends[label - 1] if label else 0 : ends[label]]
        order = own[np.argsort(-detections.scores[own])]  # n; the same unstable sort as upstream
        tp, fp = mark(overlap[order], match[order], truth.difficult, thresholds)  # T x n
        with np.errstate(divide="ignore", invalid="ignore"):
            recall = tp / float(positives[label])
        precision = tp / np.maximum(tp + fp, np.finfo(np.float64).eps)
        area = _eleven_point if metric == "11-point" else _all_point
        precisions[:, label] = [area(*curve) for curve in zip(recall, precision, strict=True)]
    return precisions


def best_matches(
    truth: GroundTruth, detections: Detections, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU of each detection with an object of its image and class, and that object.

    Returns:
        overlap: (M,) float64, -inf where there is no such object.
        match: (M,) int64 index into ``truth``, the first of equal ones; -1 where there is none.
    """
    overlap = np.full(len(detections.scores), -np.inf)
    match = np.full(len(detections.scores), -1, dtype=np.int64)
    # Objects sorted by (image, class) form groups; a detection meets one group, so the pairs are
    # counted by the groups' sizes and laid out one after another.
    key = truth.image * num_classes + truth.label
    order = np.argsort(key, kind="stable")
    wanted = detections.image * num_classes + detections.label
    first = np.searchsorted(key[order], wanted, side="left")
    count = np.searchsorted(key[order], wanted, side="right") - first
    met = np.flatnonzero(count)
    if len(met) == 0:
        return overlap, match
    count = count[met]
    starts = np.cumsum(count) - count
    left = np.repeat(met, count)  # P detections ...
    right = order[np.arange(count.sum()) + np.repeat(first[met] - starts, count)]  # ... P objects
    iou = paired_iou(truth.boxes[right], detections.boxes[left])  # P

    best = np.maximum.reduceat(iou, starts)
    overlap[met] = best
    winners = np.flatnonzero(iou == np.repeat(best, count))[::-1]
    match[left[winners]] = right[winners]  # the last assignment stays: the first of equal ones
    return overlap, match


def paired_iou(objects: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of P pairs of VOC corners, (P, 4) float64 each; a box of equal corners has one pixel."""
    gx0, gy0, gx1, gy1 = objects.T
    x0, y0, x1, y1 = boxes.T
    width = np.maximum(np.minimum(gx1, x1) - np.maximum(gx0, x0) + 1.0, 0.0)
    height = np.maximum(np.minimum(gy1, y1) - np.maximum(gy0, y0) + 1.0, 0.0)
    inter = width * height
    union = (
        (x1 - x0 + 1.0) * (y1 - y0 + 1.0) + (gx1 - gx0 + 1.0) * (gy1 - gy0 + 1.0) - inter
    )  # in upstream's order of operations
    iou: np.ndarray = inter / union
    return iou


def mark(
    overlap: np.ndarray, match: np.ndarray, difficult: np.ndarray, thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative true and false positives, (T, n) float64, of n detections by falling score.

    The first detection of an object is true, further ones are false; one of a difficult object
    is neither.
    """
    hit = overlap > np.asarray(thresholds)[:, None]  # T x n
    aside = hit & difficult[match] if len(difficult) else np.zeros_like(hit)
    true = np.zeros_like(hit)
    for row in range(len(hit)):
        candidates = np.flatnonzero(hit[row] & ~aside[row])
        _, firsts = np.unique(match[candidates], return_index=True)
        true[row, candidates[firsts]] = True
    false = ~(true | aside)
    return true.cumsum(axis=1, dtype=np.float64), false.cumsum(axis=1, dtype=np.float64)


def _eleven_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean over recalls 0, 0.1, ... 1 of the best precision at that recall or beyond."""
    if len(recall) == 0 or np.isnan(recall[0]):
        return 0.0
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    total = 0.0
    for at in np.searchsorted(recall, np.arange(0.0, 1.1, 0.1), side="left"):
        total = total + best[at] / 11.0  # divided before adding, as upstream
    return total


def _all_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """The area under the envelope of the precision-recall curve."""
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([0.0], precision, [0.0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    step = np.flatnonzero(recall[1:] != recall[:-1])
    return float(np.sum((recall[step + 1] - recall[step]) * envelope[step + 1]))

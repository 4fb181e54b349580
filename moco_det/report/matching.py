"""Matching detections to ground truth, and the score threshold that serves best."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moco_det.structures.objects import Objects, box_iou

MATCH_IOU = 0.5


def assign(
    detections: Objects, truth: Objects, iou: float = MATCH_IOU, any_class: bool = False
) -> NDArray[np.int64]:
    """Which annotation each detection takes: (N,) indices, -1 for none.

    By falling score each takes the free annotation of its class (of any, with `any_class`) with
    the largest IoU of at least `iou`. Ignored annotations can be taken any number of times, after
    the others.
    """
    taken = np.full(len(detections), -1)
    if not len(truth) or not len(detections):
        return taken
    ignored = truth.ignored_or_none()
    overlaps = box_iou(detections.boxes, truth.boxes)
    if not any_class:
        overlaps[detections.classes[:, None] != truth.classes] = 0
    free = np.ones(len(truth), dtype=bool)
    for index in np.argsort(-detections.scores_or_zero(), kind="stable"):
        for candidates in (free & ~ignored, ignored):
            best = int(np.argmax(np.where(candidates, overlaps[index], -1.0)))
            if candidates[best] and overlaps[index, best] >= iou:
                taken[index] = best
                free[best] = False
                break
    return taken


def match(detections: Objects, truth: Objects, iou: float = MATCH_IOU) -> NDArray[np.bool_]:
    """Which detections are right, as :func:`assign` pairs them: (N,) bool."""
    return assign(detections, truth, iou) >= 0


def best_threshold(pairs: Iterable[tuple[Objects, Objects]]) -> float:
    """The score at and above which (detections, truth) pairs give the best F1 at IoU 0.5.

    Models differ in how high they score; at its own best threshold each is shown as it would be
    used. 0.5 where nothing is right at any threshold.
    """
    scores, right, wanted = [], [], 0
    for detections, truth in pairs:
        scores.append(detections.scores_or_zero())
        right.append(match(detections, truth))
        wanted += int((~truth.ignored_or_none()).sum())
    return threshold_of_best_f1(scores, right, wanted)


def threshold_of_best_f1(
    scores: Sequence[NDArray[np.floating]], right: Sequence[NDArray[np.bool_]], wanted: int
) -> float:
    """:func:`best_threshold` of detections that are matched already, image by image."""
    flat = np.concatenate(scores) if scores else np.zeros(0)
    order = np.argsort(-flat, kind="stable")
    hits = np.cumsum(np.concatenate(right)[order]) if scores else np.zeros(0)
    if not len(hits) or not hits[-1]:
        return 0.5
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + wanted)
    return float(flat[order][int(np.argmax(f1))])

"""Analysis of a run's errors: precision over recall, sizes, confusions, F1 of each image.

Everything refers to boxes and is computed from the predictions that an evaluated run keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moco_det.evaluation.coco_evaluation import coco_content
from moco_det.evaluation.coco_metrics import coco_metrics
from moco_det.report.predictions_io import OpenDataset, annotated_objects, read_predictions
from moco_det.structures.objects import Objects, box_iou

MATCH_IOU = 0.5


@dataclass(frozen=True)
class RunAnalysis:
    """The analysis of one run on its test set of N images and C classes.

    Attributes:
        threshold: the score of the best F1 over the data set, at IoU 0.5.
        precision: (2, 101, C) in [0, 1] at IoU 0.50 and 0.75 and recalls 0, 0.01, ... 1, with
            COCO's interpolation; NaN for a class without objects.
        sizes: APs, APm, APl in percent, by COCO's metric; NaN where there is no such object.
        confusion: (C + 1, C + 1) counts at `threshold`: rows are annotated classes, columns
            detected ones; the last row counts detections of background, the last column missed
            objects.
        f1: (N,) in [0, 1], F1 of each image at `threshold`; NaN for images with neither objects
            nor detections.
    """

    threshold: float
    precision: NDArray[np.float64]
    sizes: Mapping[str, float]
    confusion: NDArray[np.int64]
    f1: NDArray[np.float64]


def analyse_run(run: str | Path, dataset: OpenDataset) -> RunAnalysis:
    """Analyse the predictions of one evaluated run.

    Raises:
        UserError: the run keeps no predictions, or they belong to other data.
    """
    predictions = read_predictions(run)
    truth = [annotated_objects(record) for record in dataset.records]
    found = [dataset.detections(record, predictions) for record in dataset.records]
    pairs = list(zip(found, truth, strict=True))
    taken = [assign(*pair) for pair in pairs]
    threshold = threshold_of_best_f1(
        [objects.scores_or_zero() for objects in found],
        [indices >= 0 for indices in taken],
        sum(int((~objects.ignored_or_none()).sum()) for objects in truth),
    )
    count = len(dataset.class_names)
    confusion = np.zeros((count + 1, count + 1), dtype=np.int64)
    f1 = np.full(len(pairs), np.nan)
    for index, (detections, objects) in enumerate(pairs):
        surely = detections.scores_or_zero() >= threshold
        kept, paired = detections.select(surely), taken[index][surely]
        own = count_confusions(confusion, kept, objects, paired)
        if own is not None:
            f1[index] = own
    return RunAnalysis(threshold, *_coco_view(dataset, predictions), confusion, f1)


def assign(
    detections: Objects, truth: Objects, iou: float = MATCH_IOU, any_class: bool = False
) -> NDArray[np.int64]:
    """Assign detections to annotations: (N,) indices of annotations, -1 for none.

    In order of decreasing score, each detection takes the free annotation of its class (of any
    class, with `any_class`) that has the largest IoU of at least `iou`. Ignored annotations come
    last and can be taken any number of times.
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
    """True for each detection that is right, that is, assigned to an annotation: (N,) bool."""
    return assign(detections, truth, iou) >= 0


def best_threshold(pairs: Iterable[tuple[Objects, Objects]]) -> float:
    """The lowest score to keep for the best F1 at IoU 0.5 over (detections, truth) pairs.

    Models differ in the range of their scores; at its own best threshold each is shown as it would
    be used. 0.5 if no detection is right.
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
    """:func:`best_threshold` of detections that are already matched, image by image."""
    flat = np.concatenate(scores) if scores else np.zeros(0)
    order = np.argsort(-flat, kind="stable")
    hits = np.cumsum(np.concatenate(right)[order]) if scores else np.zeros(0)
    if not len(hits) or not hits[-1]:
        return 0.5
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + wanted)
    return float(flat[order][int(np.argmax(f1))])


def count_confusions(
    confusion: NDArray[np.int64],
    detections: Objects,
    truth: Objects,
    taken: NDArray[np.int64],
) -> float | None:
    """Add one image to a confusion matrix, in place.

    A detection without an annotation of its class may take a free one of another class: a
    confusion. The remaining detections are background, the remaining annotations missed. Ignored
    annotations, and detections assigned to them, are not counted.

    Returns:
        The image's F1; None if nothing is counted.
    """
    ignored = truth.ignored_or_none()
    counted = np.array([index < 0 or not ignored[index] for index in taken], dtype=bool)
    detections, taken = detections.select(counted), taken[counted]
    right = taken >= 0
    np.add.at(confusion, (truth.classes[taken[right]], detections.classes[right]), 1)
    free = ~ignored
    free[taken[right]] = False
    rest, missed = detections.select(~right), truth.select(free)
    other = assign(rest, missed, any_class=True)
    confused = other >= 0
    np.add.at(confusion, (missed.classes[other[confused]], rest.classes[confused]), 1)
    size = len(confusion)
    confusion[-1] += np.bincount(rest.classes[~confused], minlength=size)
    unseen = np.delete(missed.classes, other[confused])
    confusion[:, -1] += np.bincount(unseen, minlength=size)
    total = len(detections) + int((~ignored).sum())
    return 2 * int(right.sum()) / total if total else None


def choose_images(f1: Sequence[NDArray[np.float64]], count: int) -> dict[str, NDArray[np.intp]]:
    """Choose the most informative images of one or several runs, `count` of each kind.

    Args:
        f1: (N,) for each run, the F1 of each image.

    Returns:
        Kind -> indices of images: "best" and "worst" by the mean over the runs and, with two or
        more runs, "most different". Each image appears at most once.
    """
    scores = np.stack(f1)  # G x N
    usable = np.flatnonzero(np.isfinite(scores).all(axis=0))
    kinds = {"worst": scores.mean(axis=0), "best": -scores.mean(axis=0)}
    if len(scores) > 1:
        kinds = {"most different": scores.min(axis=0) - scores.max(axis=0), **kinds}
    chosen: dict[str, NDArray[np.intp]] = {}
    for kind, rank in kinds.items():
        first = usable[np.argsort(rank[usable], kind="stable")][:count]
        chosen[kind] = first
        usable = np.setdiff1d(usable, first)
    return {kind: chosen[kind] for kind in ("best", "worst", "most different") if kind in chosen}


def _coco_view(
    dataset: OpenDataset, predictions: Mapping[str, list[dict[str, Any]]]
) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Precision curves and AP by size, by COCO's metric."""
    index = dataset.ids or {number: number for number in range(len(dataset.class_names))}
    classes = {key: dataset.class_names[index[key]] for key in sorted(index, key=index.__getitem__)}
    content = coco_content(dataset.records, classes)
    ids = {str(record["image_id"]): record["image_id"] for record in dataset.records}
    results = [
        {**result, "image_id": ids.get(image, image)}
        for image, found in predictions.items()
        for result in found
    ]
    metrics = coco_metrics(content, results, ["bbox"])["bbox"]
    order = np.argsort(np.argsort(list(classes)))  # the arrays are sorted by id
    curves = metrics.precision[[0, 5], :, :, 0, -1][:, :, order]
    sizes = {key: value for key, value in metrics.percentages().items() if key[-1] in "sml"}
    return np.where(curves > -1, curves, np.nan), sizes

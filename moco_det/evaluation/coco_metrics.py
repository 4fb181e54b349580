"""COCO's metrics (boxes, masks, keypoints) by hotcoco, or by pycocotools without it.

Both fill the same arrays of precision and recall, equal to the last bit; the statistics are taken
from them here, so that one definition serves both. Lin et al., "Microsoft COCO: Common Objects in
Context", ECCV 2014; pycocotools is its reference implementation.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moco_common.errors import UserError
from moco_det.data.datasets.findings import collector_paused

TASKS = ("bbox", "segm", "keypoints")
AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KEYPOINT_AP_NAMES = ("AP", "AP50", "AP75", "APm", "APl")  # small objects have no keypoints
Json = Mapping[str, Any]


@dataclass(frozen=True)
class CocoMetrics:
    """One task's evaluation. Values are in [0, 1], and -1 where there is nothing to find.

    Attributes:
        precision: (T, R, K, A, M) float64: IoU (for keypoints OKS) thresholds 0.50, 0.55, ...
            0.95; recalls 0, 0.01, ... 1; categories by ascending id; areas (all, small, medium,
            large; for keypoints all, medium, large); limits of detections per image.
        recall: (T, K, A, M) float64.
        library: the one that computed them.
    """

    task: str
    precision: np.ndarray
    recall: np.ndarray
    library: str

    def stats(self) -> np.ndarray:
        """``COCOeval.stats``: AP, AP50, AP75, AP by size, then recalls; 12 (keypoints: 10)."""
        precision, recall = self.precision, self.recall
        cuts = (slice(None), slice(0, 1), slice(5, 6))  # all thresholds, 0.50, 0.75
        sizes = range(1, precision.shape[3])
        values = [mean_of_defined(precision[cut, :, :, 0, -1]) for cut in cuts]
        values += [mean_of_defined(precision[:, :, :, size, -1]) for size in sizes]
        if self.task == "keypoints":
            values += [mean_of_defined(recall[cut, :, 0, -1]) for cut in cuts]
        else:
            values += [mean_of_defined(recall[:, :, 0, limit]) for limit in range(recall.shape[3])]
        values += [mean_of_defined(recall[:, :, size, -1]) for size in sizes]
        return np.array(values)

    def percentages(self) -> dict[str, float]:
        """AP, AP50, AP75 and AP by size, in percent; NaN where there is nothing to find."""
        names = KEYPOINT_AP_NAMES if self.task == "keypoints" else AP_NAMES
        return dict(zip(names, map(percent, self.stats().tolist()), strict=False))

    def per_category(self) -> list[float]:
        """AP of each category, by ascending id, in percent; NaN for one without objects."""
        precision = self.precision[:, :, :, 0, -1]
        return [percent(mean_of_defined(precision[:, :, k])) for k in range(precision.shape[2])]


def coco_metrics(
    truth: Json,
    results: Sequence[Json],
    tasks: Sequence[str],
    *,
    image_ids: Sequence[Any] | None = None,
    sigmas: Sequence[float] = (),
    max_detections: int = 100,
    library: str | None = None,
) -> dict[str, CocoMetrics]:
    """Evaluate detections against a COCO ground truth, neither of which is changed.

    Args:
        truth: the content of a COCO annotation file, with ids of any size that can be sorted.
        results: COCO's list of results: ``image_id``, ``category_id``, ``score`` and, by task,
            ``bbox`` (x, y, width, height), ``segmentation`` (RLE) and ``keypoints``; may be empty.
        tasks: some of "bbox", "segm" and "keypoints".
        image_ids: the images to evaluate; by default all.
        sigmas: the keypoints' standard deviations relative to the object's size; by default those
            of COCO's 17.
        max_detections: number of detections that count per category and image, at least 10
            (always 20 for keypoints).
        library: "hotcoco" or "pycocotools"; by default hotcoco where it is installed.

    Raises:
        UserError: hotcoco is asked for and not installed, or a result is of an unknown image.
    """
    if not set(tasks) <= set(TASKS):
        raise ValueError(f"tasks must be among {TASKS}, got {tasks}")
    name, dataset_class, evaluation_class = _library(library)
    found: dict[str, CocoMetrics] = {}
    # pycocotools reports its steps; and there are many dicts here, none of them garbage.
    with contextlib.redirect_stdout(io.StringIO()), collector_paused():
        numbers = Numbers(truth)
        content = numbers.truth(truth)
        dataset = _dataset(dataset_class, content)
        for task in tasks:
            if len(results):
                detections = dataset.loadRes(_for_task(results, task, numbers))
            else:  # pycocotools cannot load an empty list
                detections = _dataset(dataset_class, {**content, "annotations": []})
            evaluation = evaluation_class(dataset, detections, task)
            if task != "keypoints":
                evaluation.params.maxDets = [1, 10, max_detections]
            elif len(sigmas):
                evaluation.params.kpt_oks_sigmas = np.asarray(sigmas, dtype=np.float64)
            if image_ids is not None:
                evaluation.params.imgIds = [numbers.images[key] for key in image_ids]
            evaluation.evaluate()
            evaluation.accumulate()
            arrays = evaluation.eval
            found[task] = CocoMetrics(task, arrays["precision"], arrays["recall"], name)
    return found


def _library(name: str | None) -> tuple[str, Any, Any]:
    """Return a library's name and its classes COCO and COCOeval, whose interface is the same."""
    if name is None:
        name = "hotcoco" if importlib.util.find_spec("hotcoco") else "pycocotools"
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return name, COCO, COCOeval
    if name != "hotcoco":
        raise ValueError(f"library must be hotcoco or pycocotools, got {name}")
    try:
        import hotcoco
    except ModuleNotFoundError:
        raise UserError(
            "fast COCO metrics need hotcoco: pip install 'moco-det[fast-eval]'"
        ) from None
    return name, hotcoco.COCO, hotcoco.COCOeval


def _dataset(dataset_class: Any, content: Json) -> Any:
    dataset = dataset_class()
    dataset.dataset = content
    dataset.createIndex()
    return dataset


class Numbers:
    """Numbers from 1 in place of the ids of images and categories, in the order of the ids, which
    decides among equal scores.

    hotcoco takes whole numbers for images, both libraries carry all ids of detections as float64,
    which is exact up to 2^53 only, and pycocotools takes the annotation 0 for "no match".
    """

    def __init__(self, truth: Json) -> None:
        self.images, self.categories = (
            {key: number for number, key in enumerate(sorted({i["id"] for i in truth[part]}), 1)}
            for part in ("images", "categories")
        )

    def truth(self, truth: Json) -> Json:
        """Return the ground truth with numbers.

        Annotations of an image or a category that is not listed are left out.
        """
        kept = [
            item
            for item in truth["annotations"]
            if item["image_id"] in self.images and item["category_id"] in self.categories
        ]
        return {
            **truth,
            "images": [{**image, "id": self.images[image["id"]]} for image in truth["images"]],
            "categories": [{**c, "id": self.categories[c["id"]]} for c in truth["categories"]],
            "annotations": [
                {**item, "id": number, **self.of(item)} for number, item in enumerate(kept, 1)
            ],
        }

    def of(self, item: Json) -> dict[str, int]:
        """Return image and category of an annotation or detection; 0 for an unknown category."""
        category = self.categories.get(item["category_id"], 0)
        return {"image_id": self.images[item["image_id"]], "category_id": category}


def _for_task(results: Sequence[Json], task: str, numbers: Numbers) -> Any:
    """Return the part of the results that one task needs, in the form that both libraries take.

    A box's area would decide between small, medium and large: masks are therefore passed
    without boxes. For keypoints the box does decide, as in Detectron2.
    """
    try:
        if task == "bbox":  # N x 7: image, x, y, width, height, score, category
            rows = [
                (of["image_id"], *result["bbox"], result["score"], of["category_id"])
                for result, of in ((result, numbers.of(result)) for result in results)
            ]
            return np.array(rows, dtype=np.float64)
        needed = ("segmentation",) if task == "segm" else ("bbox", "keypoints")
        return [
            {**numbers.of(result), "score": result["score"], **{k: result[k] for k in needed}}
            for result in results
        ]
    except KeyError as error:
        if error.args[0] in ("bbox", "segmentation", "keypoints"):
            raise UserError(
                f"a detection has no '{error.args[0]}', which the metrics of '{task}' need: "
                "evaluate for what the model predicts"
            ) from None
        raise UserError(
            f"image {error.args[0]} of the detections is not in the ground truth: both must be of "
            "the same data set"
        ) from None


def mean_of_defined(values: np.ndarray) -> float:
    """Return the mean of the defined values (not -1), or -1 if there is none."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def percent(value: float) -> float:
    """Convert a share to percent, and -1 (nothing to find) to NaN."""
    return float(value) * 100 if value >= 0 else float("nan")

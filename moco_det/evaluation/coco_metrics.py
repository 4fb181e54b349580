"""COCO's metrics (boxes, masks, keypoints) by hotcoco, or by pycocotools where that is not there.

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
            large; for keypoints all, medium, large); most detections an image.
        recall: (T, K, A, M) float64.
        library: which one computed them.
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
        truth: the content of a COCO annotation file; ids of images of one type that sorts.
        results: COCO's list of results: ``image_id``, ``category_id``, ``score`` and, by task,
            ``bbox`` (x, y, width, height), ``segmentation`` (RLE) and ``keypoints``; may be empty.
        tasks: some of "bbox", "segm" and "keypoints".
        image_ids: the images to evaluate; by default all.
        sigmas: the keypoints' standard deviations relative to the object's size; by default those
            of COCO's 17.
        max_detections: how many detections of a category count in an image, at least 10 (for
            keypoints it is 20).
        library: "hotcoco" or "pycocotools"; by default hotcoco where it is installed.

    Raises:
        UserError: hotcoco is asked for and not installed, or a result is of an unknown image.
    """
    if not set(tasks) <= set(TASKS):
        raise ValueError(f"there are the tasks {TASKS}, not {tasks}")
    name, dataset_class, evaluation_class = _library(library)
    found: dict[str, CocoMetrics] = {}
    # pycocotools reports its steps; and there are many dicts here, none of them garbage.
    with contextlib.redirect_stdout(io.StringIO()), collector_paused():
        content, numbers = _with_sound_ids(truth)
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
                evaluation.params.imgIds = [numbers[key] for key in image_ids]
            evaluation.evaluate()
            evaluation.accumulate()
            arrays = evaluation.eval
            found[task] = CocoMetrics(task, arrays["precision"], arrays["recall"], name)
    return found


def _library(name: str | None) -> tuple[str, Any, Any]:
    """Its name, its class of data sets and its class of evaluations: both have one interface."""
    if name is None:
        name = "hotcoco" if importlib.util.find_spec("hotcoco") else "pycocotools"
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return name, COCO, COCOeval
    if name != "hotcoco":
        raise ValueError(f"there are hotcoco and pycocotools, not {name}")
    try:
        import hotcoco
    except ModuleNotFoundError:
        raise UserError(
            "fast COCO metrics need hotcoco: pip install 'moco-det[fast-eval]'"
        ) from None
    return name, hotcoco.COCO, hotcoco.COCOeval


def _dataset(dataset_class: Any, content: Json) -> Any:
    dataset = dataset_class()
    if dataset_class.__module__.startswith("pycocotools"):  # it writes into the annotations
        content = {**content, "annotations": list(map(dict, content["annotations"]))}
    dataset.dataset = content
    dataset.createIndex()
    return dataset


def _with_sound_ids(truth: Json) -> tuple[Json, dict[Any, int]]:
    """The ground truth with ids that both libraries take, and image id -> its number there.

    hotcoco takes whole numbers for images. pycocotools takes the annotation 0 for "no match", and
    loses that object. The order of the images stays: it decides among equal scores.
    """
    images, annotations = truth["images"], truth["annotations"]
    numbers = {image["id"]: image["id"] for image in images}
    ids = {item.get("id", 0) for item in annotations}
    whole = all(isinstance(key, int) and key >= 0 for key in numbers)
    if whole and 0 not in ids and len(ids) == len(annotations):
        return truth, numbers
    numbers = {key: number for number, key in enumerate(sorted(numbers), 1)}
    sound = {
        "images": [{**image, "id": numbers[image["id"]]} for image in images],
        "annotations": [
            {**item, "id": number, "image_id": numbers[item["image_id"]]}
            for number, item in enumerate(annotations, 1)
        ],
    }
    return {**truth, **sound}, numbers


def _for_task(results: Sequence[Json], task: str, numbers: Mapping[Any, int]) -> Any:
    """What one task needs of the results, as both libraries take it.

    A box's area would decide between small, medium and large: masks therefore go without. With
    keypoints it does decide, as in Detectron2.
    """
    try:
        if task == "bbox":  # N x 7: image, x, y, width, height, score, category
            return np.array(
                [
                    (numbers[r["image_id"]], *r["bbox"], r["score"], r["category_id"])
                    for r in results
                ],
                dtype=np.float64,
            )
        if task == "segm":
            return [
                {
                    "image_id": numbers[r["image_id"]],
                    "category_id": r["category_id"],
                    "score": r["score"],
                    "segmentation": r["segmentation"],
                }
                for r in results
            ]
        return [
            {
                "image_id": numbers[r["image_id"]],
                "category_id": r["category_id"],
                "score": r["score"],
                "bbox": r["bbox"],
                "keypoints": r["keypoints"],
            }
            for r in results
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
    """The mean of what is defined, -1 if nothing is."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def percent(value: float) -> float:
    """NaN for -1, which stands for nothing to find."""
    return float(value) * 100 if value >= 0 else float("nan")

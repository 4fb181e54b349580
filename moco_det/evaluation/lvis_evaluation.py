"""LVIS's metrics: box and mask AP over more than 1,000 classes, each judged on its own images.

Gupta et al. 2019, "LVIS: A Dataset for Large Vocabulary Instance Segmentation", section 2: an image
counts for a class only where its absence was verified or all its objects were annotated. Computed
by hotcoco, equal to the lvis package to the last bit, which fails on NumPy 1.24 and later.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from moco_common.errors import UserError
from moco_common.files import write_json_atomically
from moco_det.evaluation.coco_evaluation import read_ground_truth
from moco_det.evaluation.coco_metrics import Numbers, mean_of_defined, percent
from moco_det.evaluation.gather import PREDICTIONS_FILE, images_once, shares_of_ranks

MAX_DETECTIONS = 300  # per image, over all classes
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


class LVISEvaluator(DatasetEvaluator):
    """Box and mask AP as LVIS defines them.

    Args:
        dataset_name: one of Detectron2's LVIS data sets; its metadata hold ``json_file``.
        tasks: some of "bbox" and "segm"; by default both.
        output_dir: directory for the predictions.
        distributed: whether the predictions of all ranks are gathered; all must then call it.

    Raises:
        UserError: hotcoco is not installed.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        tasks: Sequence[str] | None = None,
        output_dir: str | os.PathLike[str],
        distributed: bool = True,
    ) -> None:
        if importlib.util.find_spec("hotcoco") is None:
            raise UserError("LVIS's metrics need hotcoco: pip install 'moco-det[fast-eval]'.")
        self.metadata = MetadataCatalog.get(dataset_name)
        self.dataset_name = dataset_name
        self.tasks = tuple(tasks or ("bbox", "segm"))
        self.output_dir = Path(output_dir)
        self.distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Clear the predictions."""
        # For each image: its id and its detections.
        self.found: list[tuple[Any, list[dict[str, Any]]]] = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keep the ``instances`` that the model found in some images."""
        for example, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            results = instances_to_coco_json(instances, example["image_id"])
            self.found.append((example["image_id"], results))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return ``{"bbox": {"AP", ..., "APr", "APc", "APf", "AP-<class>"}, ...}`` in percent on
        the first rank, and ``{}`` elsewhere. APr, APc and APf are for rare, common and frequent
        classes; NaN where there is nothing to find.

        Raises:
            UserError: an image was not evaluated, or is not of the data set.
        """
        shares = shares_of_ranks(self.found, self.distributed)
        if shares is None:
            return {}
        from hotcoco import LVIS

        content = read_ground_truth(self.dataset_name, self.metadata.json_file)
        numbers = Numbers(content)
        truth = LVIS(_numbered(content, numbers))
        found = [image for share in shares for image in share]
        expected = [image["id"] for image in content["images"]]
        chosen = images_once(self.dataset_name, [image for image, _ in found], expected)
        ids = self.metadata.get("thing_dataset_id_to_contiguous_id")
        category = {index: key for key, index in ids.items()} if ids else None
        results = [
            # LVIS counts its categories from 1.
            {**r, "category_id": category[r["category_id"]] if category else r["category_id"] + 1}
            for index in chosen
            for r in found[index][1]
        ]
        write_json_atomically(self.output_dir / PREDICTIONS_FILE, results)
        numbered = [{**result, **numbers.of(result)} for result in results]
        classes = self.metadata.thing_classes
        return {task: lvis_metrics(truth, numbered, task, classes) for task in self.tasks}


def _numbered(content: dict[str, Any], numbers: Numbers) -> dict[str, Any]:
    """Return the ground truth with numbers for ids, also in each image's lists of categories."""
    truth = dict(numbers.truth(content))
    for image in truth["images"]:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            judged = [numbers.categories.get(category) for category in image.get(key, ())]
            image[key] = [number for number in judged if number is not None]
    return truth


def lvis_metrics(
    truth: Any, results: list[dict[str, Any]], task: str, classes: Sequence[str]
) -> dict[str, float]:
    """LVIS's metrics of one task, in percent.

    Args:
        truth: a ``hotcoco.LVIS``, with ids below 2^53.
        results: COCO's list of results.
        task: "bbox" or "segm".
        classes: names in the order of the category ids; each gets an ``AP-<name>`` where the
            ground truth has these categories and no others.
    """
    from hotcoco import LVISEval, LVISResults

    if task == "segm":  # with a box in it, the box's area would decide what is small
        results = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
    if not results:
        return dict.fromkeys(METRICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = LVISEval(truth, LVISResults(truth, results, MAX_DETECTIONS), task)
        evaluation.run()
        found = evaluation.get_results()
        arrays: Any = evaluation.eval
    metrics = {name: percent(found[name]) for name in METRICS}
    precision = np.asarray(arrays["precision"])  # (T, R, K, A, 1)
    if precision.shape[2] == len(classes):
        for index, name in enumerate(classes):
            metrics[f"AP-{name}"] = percent(mean_of_defined(precision[:, :, index, 0]))
    return metrics

"""The COCO evaluator: Detectron2's interface around :mod:`moco_det.evaluation.coco_metrics`."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode
from detectron2.utils.logger import create_small_table

from moco_common.errors import UserError
from moco_common.files import read_json, write_json_atomically
from moco_common.text import counted
from moco_det.evaluation.coco_metrics import TASKS, coco_metrics
from moco_det.evaluation.gather import (
    PREDICTIONS_FILE,
    images_once,
    report_absent,
    shares_of_ranks,
)

logger = logging.getLogger(__name__)
PREDICTED = {"bbox": "pred_boxes", "segm": "pred_masks", "keypoints": "pred_keypoints"}
OTHER_SIGMA = 0.07  # the mean of COCO's 17, for keypoints that nobody has measured


class _Share(NamedTuple):
    """The predictions of one process: its images, the results of each, and their tasks."""

    images: list[Any]
    results: list[list[dict[str, Any]]]
    tasks: set[str]


class InstanceEvaluator(DatasetEvaluator):
    """COCO AP of boxes, masks and keypoints: the statistics of pycocotools, in seconds.

    Data sets with a ``json_file`` (Detectron2's own) are evaluated on that file, your own on what
    their reader kept. Writes the predictions in COCO's result format. The results have the names
    that Detectron2's ``COCOEvaluator`` uses. Unlike with that class, AP is 0 if nothing is
    detected, and AP by class is correct for any order of the category ids.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        tasks: Sequence[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        distributed: bool = True,
        sigmas: Sequence[float] = (),
        max_detections: int = 100,
        library: str | None = None,
    ) -> None:
        """
        Args:
            tasks: some of "bbox", "segm", "keypoints"; by default what the predictions and the
                data both hold.
            sigmas: one per keypoint (``TEST.KEYPOINT_OKS_SIGMAS``); by default COCO's for COCO's
                17 names, and their mean for others.
            max_detections, library: as in :func:`moco_det.evaluation.coco_metrics.coco_metrics`.

        Raises:
            UserError: the data lack one of the ``tasks``.
        """
        metadata = MetadataCatalog.get(dataset_name)
        self._name = dataset_name
        self._classes: list[str] = list(metadata.thing_classes)
        names = list(metadata.get("keypoint_names") or [])
        held = {"bbox"}
        held |= {"segm"} if metadata.get("has_masks", True) else set()
        held |= {"keypoints"} if names or metadata.get("json_file") else set()
        for task in tasks or ():
            if task not in held:
                what = {"segm": "masks", "keypoints": "keypoints"}.get(task, f"task '{task}'")
                raise UserError(f"{dataset_name} has no {what}: it cannot be evaluated for {task}")
        self._held, self._wanted = held, tasks
        self._sigmas = tuple(sigmas)
        if names and not sigmas and tuple(names) != COCO_PERSON_KEYPOINT_NAMES:
            self._sigmas = (OTHER_SIGMA,) * len(names)
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._distributed = distributed
        self._options: dict[str, Any] = {"max_detections": max_detections, "library": library}
        self._truth: dict[str, Any] | None = None
        self.reset()

    def reset(self) -> None:
        self._share = _Share([], [], set())

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            if instances.has("pred_keypoints"):  # they are shifted in place
                instances.pred_keypoints = instances.pred_keypoints.clone()
            self._share.images.append(image["image_id"])
            self._share.results.append(instances_to_coco_json(instances, image["image_id"]))
            self._share.tasks.update(t for t in TASKS if instances.has(PREDICTED[t]))

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> dict[str, dict[str, float]]:
        """Return the metrics over all images, or over ``img_ids``; ``{}`` off the main process.

        Returns:
            task -> AP, AP50, AP75, AP by size, and ``AP-<class>``, in percent; NaN where the
            ground truth has nothing to find.

        Raises:
            UserError: an image was not evaluated, or is not of the data set.
        """
        shares = shares_of_ranks(self._share, self._distributed)
        if shares is None:
            return {}
        if self._truth is None:
            self._truth = _ground_truth(self._name)
        expected = [image["id"] for image in self._truth["images"]] if img_ids is None else img_ids
        images = [image for share in shares for image in share.images]
        found = [results for share in shares for results in share.results]
        chosen = images_once(self._name, images, expected)
        class_ids = _class_ids(self._name)
        most = max((r["category_id"] for index in chosen for r in found[index]), default=0)
        if most >= len(class_ids):
            raise UserError(
                f"the model predicts class {most}, but {self._name} has "
                f"{counted(len(class_ids), 'class')}, counted from 0: "
                "evaluate on the classes of its training data"
            )
        results = [
            {**result, "category_id": class_ids[result["category_id"]]}
            for result in itertools.chain.from_iterable(found[index] for index in chosen)
        ]
        if self._output_dir is not None:
            write_json_atomically(self._output_dir / PREDICTIONS_FILE, results)
        if self._truth.get("annotations") is None:
            logger.info(f"{self._name} has no annotations: the predictions are only written")
            return {}
        predicted = set().union(*(share.tasks for share in shares)) & self._held
        tasks = [task for task in TASKS if task in (self._wanted or predicted)]
        metrics = coco_metrics(
            self._truth, results, tasks, image_ids=img_ids, sigmas=self._sigmas, **self._options
        )
        categories = sorted(category["id"] for category in self._truth["categories"])
        scores: dict[str, dict[str, float]] = {}
        for task, values in metrics.items():
            scores[task] = values.percentages()
            logger.info(f"{task} by {values.library}:\n{create_small_table(scores[task])}")
            by_class = values.per_category()
            for name, key in zip(self._classes, class_ids, strict=True):
                scores[task][f"AP-{name}"] = by_class[categories.index(key)]
        report_absent(self._name, self._classes, self._absent(class_ids))
        return scores

    def _absent(self, class_ids: Sequence[int]) -> list[int]:
        """Return the indices of the classes without an object to find in the ground truth."""
        assert self._truth is not None
        present = {a["category_id"] for a in self._truth["annotations"] if not a.get("iscrowd")}
        return [index for index, key in enumerate(class_ids) if key not in present]


def coco_ground_truth(dataset_name: str) -> dict[str, Any]:
    """A registered data set as the content of a COCO file."""
    metadata = MetadataCatalog.get(dataset_name)
    classes = dict(zip(_class_ids(dataset_name), metadata.thing_classes, strict=True))
    num_keypoints = len(metadata.get("keypoint_names") or ())
    return coco_content(DatasetCatalog.get(dataset_name), classes, num_keypoints)


def coco_content(
    records: Iterable[Mapping[str, Any]], classes: Mapping[int, str], num_keypoints: int = 0
) -> dict[str, Any]:
    """Detectron2's dataset dicts as the content of a COCO file.

    Unlike Detectron2's ``convert_to_coco_dict`` it keeps boxes unrounded, and the area given in
    the data, which decides between small, medium and large. VOC's difficult objects become
    crowds, which count neither as missed when not found nor as wrong when found.

    Args:
        classes: category id -> name, in the order of the dicts' class indices.
    """
    class_ids = list(classes)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        images.append({k: record[k] for k in ("width", "height", "file_name")})
        images[-1]["id"] = record["image_id"]
        for item in record["annotations"]:
            box = BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYWH_ABS)
            annotation = {
                "id": len(annotations) + 1,
                "image_id": record["image_id"],
                "category_id": class_ids[item["category_id"]],
                "bbox": [float(value) for value in box],
                "area": float(item.get("area", box[2] * box[3])),
                "iscrowd": int(item.get("iscrowd", 0) or item.get("difficult", 0)),
            }
            if "segmentation" in item:
                annotation["segmentation"] = item["segmentation"]
            if num_keypoints:
                points = item.get("keypoints") or [0.5, 0.5, 0] * num_keypoints
                # Pixel indices again: Detectron2's dicts hold the pixels' centres.
                annotation["keypoints"] = [
                    value if at % 3 == 2 else value - 0.5 for at, value in enumerate(points)
                ]
                annotation["num_keypoints"] = sum(value > 0 for value in points[2::3])
            annotations.append(annotation)
    categories = [{"id": key, "name": name} for key, name in classes.items()]
    return {"info": {}, "images": images, "categories": categories, "annotations": annotations}


def _class_ids(dataset_name: str) -> list[int]:
    """The category id of each class, in the order of the classifier."""
    metadata = MetadataCatalog.get(dataset_name)
    index = metadata.get("thing_dataset_id_to_contiguous_id")
    if index is None:
        return list(range(len(metadata.thing_classes)))
    return sorted(index, key=index.__getitem__)


def _ground_truth(dataset_name: str) -> dict[str, Any]:
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is None:
        return coco_ground_truth(dataset_name)
    return read_ground_truth(dataset_name, json_file)


def read_ground_truth(dataset_name: str, json_file: str) -> dict[str, Any]:
    """Read the annotation file of one of Detectron2's data sets.

    Raises:
        UserError: it is not a readable COCO file.
    """
    try:
        content = read_json(json_file)
        return {**content, "images": content["images"], "categories": content["categories"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{dataset_name} cannot be evaluated: {json_file} is not a readable COCO annotation "
            f"file ({type(error).__name__}: {error})"
        ) from error

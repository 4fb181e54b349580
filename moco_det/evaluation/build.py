"""Evaluators by ``evaluator_type``, the key by which Detectron2 registers its data sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from moco_common.errors import UserError
from moco_det.evaluation.cityscapes_evaluation import CityscapesInstanceEvaluator
from moco_det.evaluation.coco_evaluation import InstanceEvaluator
from moco_det.evaluation.lvis_evaluation import LVISEvaluator
from moco_det.evaluation.pascal_voc_evaluation import VOCEvaluator
from moco_det.evaluation.sem_seg_evaluation import SemanticEvaluator

__all__ = ["build_evaluator", "evaluated_tasks"]


class _Kind(NamedTuple):
    """The evaluation of data sets of one ``evaluator_type``."""

    evaluator: Callable[..., DatasetEvaluator]
    tasks: tuple[str, ...]  # that its metrics support
    options: tuple[str, ...] = ()  # arguments of `build_evaluator` that it accepts


_VOC = _Kind(VOCEvaluator, ("bbox",), ("output_dir", "metric"))
_SEMANTIC = _Kind(SemanticEvaluator, ("sem_seg",))
_KINDS = {
    "voc": _VOC,
    "pascal_voc": _VOC,
    "coco": _Kind(
        InstanceEvaluator, ("bbox", "segm", "keypoints"), ("output_dir", "tasks", "sigmas")
    ),
    "lvis": _Kind(LVISEvaluator, ("bbox", "segm"), ("output_dir", "tasks")),
    "cityscapes_instance": _Kind(CityscapesInstanceEvaluator, ("segm",), ("output_dir",)),
    "cityscapes_sem_seg": _SEMANTIC,
    "sem_seg": _SEMANTIC,
}


def build_evaluator(
    dataset_name: str,
    *,
    tasks: Sequence[str] | None = None,
    output_dir: str | os.PathLike[str],
    distributed: bool = True,
    metric: str | None = None,
    sigmas: Sequence[float] = (),
) -> DatasetEvaluator:
    """Return the evaluator for a registered data set.

    Args:
        dataset_name: a name in Detectron2's catalogs, such as one from
            :func:`moco_det.data.register.register`.
        tasks: some of "bbox", "segm", "keypoints" and "sem_seg"; by default those that
            the predictions and the data both hold.
        output_dir: directory for the predictions (``coco_instances_results.json``) and the
            evaluator's other files.
        distributed: whether the predictions of all ranks are gathered; all must then call it.
        metric: VOC only: "11-point" or "all-point"; by default 11-point for VOC 2007.
        sigmas: for the object keypoint similarity, one per keypoint; by default COCO's.

    Returns:
        An evaluator whose ``evaluate()`` gives, on the main process, ``{"bbox": {"AP", "AP50",
        "AP75", "AP-<class>", ...}, "segm": {...}, "keypoints": {...}}`` or ``{"sem_seg":
        {"mIoU", "IoU-<class>", ...}}``, in percent; ``{}`` elsewhere.

    Raises:
        UserError: the data set is not registered, lacks what ``tasks`` asks for, or its metrics
            need a package that is not installed.
    """
    kind = _kind(dataset_name)
    if tasks is not None and not set(tasks) <= set(kind.tasks):
        known = " and ".join(kind.tasks)
        only = "has boxes only" if kind.tasks == ("bbox",) else f"is evaluated for {known}"
        raise UserError(f"{dataset_name} {only}: it cannot be evaluated for {tasks}")
    options = {"output_dir": output_dir, "tasks": tasks, "metric": metric, "sigmas": sigmas}
    taken = {name: options[name] for name in kind.options}
    return kind.evaluator(dataset_name, distributed=distributed, **taken)


def evaluated_tasks(cfg: CfgNode, dataset_name: str) -> tuple[str, ...]:
    """Return the tasks that both the model and a registered data set have.

    Raises:
        UserError: there is none.
    """
    metadata, tasks = MetadataCatalog.get(dataset_name), _kind(dataset_name).tasks
    lacking = set()
    if not (cfg.MODEL.MASK_ON and metadata.get("has_masks", True)):
        lacking.add("segm")
    if not (cfg.MODEL.KEYPOINT_ON and metadata.get("keypoint_names")):
        lacking.add("keypoints")
    common = tuple(task for task in tasks if task not in lacking)
    if not common:
        raise UserError(
            f"{dataset_name} is evaluated for {' and '.join(tasks)}, which the model does not "
            "predict: choose another protocol or test set."
        )
    return common


def _kind(dataset_name: str) -> _Kind:
    if dataset_name not in DatasetCatalog:
        raise UserError(f"'{dataset_name}' is not registered: register the data set first")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _KINDS:
        raise UserError(
            f"there is no evaluator for {dataset_name}, whose evaluator_type is {kind!r}: "
            f"the known types are {', '.join(_KINDS)}"
        )
    return _KINDS[kind]

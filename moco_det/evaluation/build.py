"""Evaluators, chosen by a data set's metadata."""

from __future__ import annotations

import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from moco_common.errors import UserError
from moco_det.evaluation.cityscapes_evaluation import CityscapesInstanceEvaluator
from moco_det.evaluation.coco_evaluation import InstanceEvaluator
from moco_det.evaluation.lvis_evaluation import LVISEvaluator
from moco_det.evaluation.pascal_voc_evaluation import VOCEvaluator
from moco_det.evaluation.sem_seg_evaluation import SemanticEvaluator

__all__ = [
    "CityscapesInstanceEvaluator",
    "InstanceEvaluator",
    "LVISEvaluator",
    "SemanticEvaluator",
    "VOCEvaluator",
    "build_evaluator",
]
# evaluator_type -> the tasks that its metrics know.
TASKS = {
    "voc": ("bbox",),
    "pascal_voc": ("bbox",),
    "coco": ("bbox", "segm", "keypoints"),
    "lvis": ("bbox", "segm"),
    "cityscapes_instance": ("segm",),
    "cityscapes_sem_seg": ("sem_seg",),
    "sem_seg": ("sem_seg",),
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
    """The evaluator for a registered data set.

    Args:
        dataset_name: a name in Detectron2's catalogs, such as one from
            :func:`moco_det.data.register.register`.
        tasks: some of "bbox", "segm", "keypoints" and "sem_seg"; by default what the predictions
            and the data both hold.
        output_dir: where the predictions go, as ``coco_instances_results.json``, and what else the
            evaluator writes.
        distributed: whether the predictions of all ranks are gathered; all must then call it.
        metric: VOC only: "11-point" or "all-point"; by default 11-point for VOC 2007.
        sigmas: of the object keypoint similarity, one a keypoint; by default COCO's.

    Returns:
        An evaluator whose ``evaluate()`` gives, on the main process, ``{"bbox": {"AP", "AP50",
        "AP75", "AP-<class>", ...}, "segm": {...}, "keypoints": {...}}`` or ``{"sem_seg":
        {"mIoU", "IoU-<class>", ...}}``, in percent; ``{}`` elsewhere.

    Raises:
        UserError: the data set is not registered, lacks what ``tasks`` asks for, or its metrics
            need a package that is not installed.
    """
    if dataset_name not in DatasetCatalog:
        raise UserError(f"'{dataset_name}' is not registered: register the data set first")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in TASKS:
        raise UserError(
            f"there is no evaluator for {dataset_name}, whose evaluator_type is {kind!r}: "
            f"there are {', '.join(TASKS)}"
        )
    if tasks is not None and not set(tasks) <= set(TASKS[kind]):
        known = " and ".join(TASKS[kind])
        only = "has boxes only" if TASKS[kind] == ("bbox",) else f"is evaluated for {known}"
        raise UserError(f"{dataset_name} {only}: it cannot be evaluated for {tasks}")
    if kind in ("voc", "pascal_voc"):
        return VOCEvaluator(
            dataset_name, output_dir=output_dir, distributed=distributed, metric=metric
        )
    if kind in ("sem_seg", "cityscapes_sem_seg"):
        return SemanticEvaluator(dataset_name, distributed=distributed)
    if kind == "cityscapes_instance":
        return CityscapesInstanceEvaluator(
            dataset_name, output_dir=output_dir, distributed=distributed
        )
    if kind == "lvis":
        return LVISEvaluator(
            dataset_name,
            tasks=("bbox", "segm") if tasks is None else tasks,
            output_dir=output_dir,
            distributed=distributed,
        )
    return InstanceEvaluator(
        dataset_name, tasks=tasks, output_dir=output_dir, distributed=distributed, sigmas=sigmas
    )


_KINDS = {
    "voc": ("bbox",),
    "pascal_voc": ("bbox",),
    "sem_seg": ("sem_seg",),
    "cityscapes_sem_seg": ("sem_seg",),
    "cityscapes_instance": ("segm",),
}


def evaluated_tasks(cfg: CfgNode, dataset_name: str) -> tuple[str, ...]:
    """The tasks that both the model and a registered data set have.

    Returns:
        Some of "bbox", "segm" and "keypoints", or "sem_seg".
    """
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.evaluator_type
    if kind in _KINDS:
        return _KINDS[kind]
    masks = cfg.MODEL.MASK_ON and metadata.get("has_masks", True)
    keypoints = cfg.MODEL.KEYPOINT_ON and metadata.get("keypoint_names")
    return ("bbox", *(["segm"] if masks else []), *(["keypoints"] if keypoints else []))

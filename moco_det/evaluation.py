"""Evaluators, chosen by a data set's metadata."""

from __future__ import annotations

import os
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from .coco_evaluator import InstanceEvaluator
from .errors import UserError
from .voc_evaluator import VOCEvaluator

__all__ = ["InstanceEvaluator", "VOCEvaluator", "build_evaluator"]


def build_evaluator(
    dataset_name: str,
    *,
    tasks: Sequence[str] | None = None,
    output_dir: str | os.PathLike[str],
    distributed: bool = True,
    metric: str | None = None,
) -> DatasetEvaluator:
    """The evaluator for a registered data set.

    Args:
        dataset_name: a name from :func:`moco_det.datasets.register`.
        tasks: some of "bbox" and "segm"; by default what the predictions and the data both hold.
        output_dir: where the predictions go, as ``coco_instances_results.json``, and what else the
            evaluator writes.
        distributed: whether the predictions of all ranks are gathered; all must then call it.
        metric: VOC only: "11-point" or "all-point"; by default 11-point for VOC 2007.

    Returns:
        An evaluator whose ``evaluate()`` gives, on the main process, ``{"bbox": {"AP", "AP50",
        "AP75", "AP-<class>", ...}, "segm": {...}}``, in percent; ``{}`` elsewhere.

    Raises:
        UserError: if the data set is not registered, or lacks what ``tasks`` asks for.
    """
    if dataset_name not in DatasetCatalog:
        raise UserError(f"'{dataset_name}' is not registered: register the data set first")
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    if kind in ("voc", "pascal_voc"):
        if tasks is not None and set(tasks) != {"bbox"}:
            raise UserError(f"{dataset_name} has boxes only: it cannot be evaluated for {tasks}")
        return VOCEvaluator(
            dataset_name, output_dir=output_dir, distributed=distributed, metric=metric
        )
    if kind == "coco":
        return InstanceEvaluator(
            dataset_name, tasks=tasks, output_dir=output_dir, distributed=distributed
        )
    raise UserError(
        f"there is no evaluator for {dataset_name}, whose evaluator_type is {kind!r}: "
        "there are voc, pascal_voc and coco"
    )

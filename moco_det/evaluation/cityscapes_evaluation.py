"""Cityscapes' instance metric: mask AP over eight classes, crowded and void regions left out.

Cordts et al. 2016, "The Cityscapes Dataset for Semantic Urban Scene Understanding", section 4.2,
as its published script computes it. That script needs files for every mask, one machine, and an
older NumPy than the current one; here each image is reduced to a few counts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from moco_common.errors import UserError
from moco_common.files import write_json_atomically
from moco_det.data.datasets.label_files import read_labels
from moco_det.evaluation.gather import PREDICTIONS_FILE, images_once, shares_of_ranks

# Cityscapes' label ids. An instance has the id label * 1000 + number, a group its label.
LABELS = {
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
THRESHOLDS = np.arange(0.5, 1.0, 0.05)
MIN_PIXELS = 100  # smaller annotated instances need not be found


class Overlaps(NamedTuple):
    """The overlaps of one class in one image, for P predictions and G annotated regions.

    Attributes:
        scores: (P,) float64.
        sizes: (P,) int64 pixels.
        void: (P,) int64 pixels on void regions.
        ids: (G,) int64 instance ids; below 1000 for a group.
        areas: (G,) int64 pixels.
        shared: (P, G) int64 pixels.
    """

    scores: np.ndarray
    sizes: np.ndarray
    void: np.ndarray
    ids: np.ndarray
    areas: np.ndarray
    shared: np.ndarray


class CityscapesInstanceEvaluator(DatasetEvaluator):
    """Mask AP of one of Detectron2's Cityscapes data sets.

    Args:
        dataset_name: a data set whose metadata hold ``gt_dir`` and ``thing_classes``.
        output_dir: directory for the predictions.
        distributed: whether the counts of all ranks are gathered; all must then call it.
    """

    def __init__(
        self, dataset_name: str, *, output_dir: str | os.PathLike[str], distributed: bool = True
    ) -> None:
        self.dataset_name = dataset_name
        self.metadata = MetadataCatalog.get(dataset_name)
        self.output_dir = Path(output_dir)
        self.distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Clear the counts."""
        # For each image: its id, its overlaps by class, and its predictions in COCO's format.
        self.found: list[tuple[str, list[Overlaps], list[dict[str, Any]]]] = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Count the pixels that predicted ``instances`` share with annotated ones."""
        labels = [LABELS[name] for name in self.metadata.thing_classes]
        for example, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            annotated = read_labels(self._annotation(example["file_name"]))
            masks = np.asarray(instances.pred_masks, dtype=bool)
            classes, scores = instances.pred_classes.numpy(), instances.scores.numpy()
            overlaps = count_overlaps(masks, classes, scores, annotated, labels)
            results = instances_to_coco_json(instances, example["image_id"])
            self.found.append((example["image_id"], overlaps, results))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return ``{"segm": {"AP", "AP50", "AP-<class>", ...}}`` in percent on the first rank, and
        ``{}`` elsewhere. AP is NaN for a class without instances.

        Raises:
            UserError: an image was not evaluated, or is not of the data set.
        """
        shares = shares_of_ranks(self.found, self.distributed)
        if shares is None:
            return {}
        found = [image for share in shares for image in share]
        expected = [record["image_id"] for record in DatasetCatalog.get(self.dataset_name)]
        chosen = images_once(self.dataset_name, [image for image, _, _ in found], expected)
        results = [result for index in chosen for result in found[index][2]]
        write_json_atomically(self.output_dir / PREDICTIONS_FILE, results)
        ap = np.array(
            [
                [average_precision([found[i][1][k] for i in chosen], t) for t in THRESHOLDS]
                for k in range(len(self.metadata.thing_classes))
            ]
        )
        by_class = zip(self.metadata.thing_classes, ap.mean(axis=1), strict=True)
        return {
            "segm": {
                "AP": _percent(ap),
                "AP50": _percent(ap[:, 0]),
                **{f"AP-{name}": 100 * float(value) for name, value in by_class},
            }
        }

    def _annotation(self, image: str) -> Path:
        """Return gt_dir/CITY/NAME_gtFine_instanceIds.png for .../CITY/NAME_leftImg8bit.png."""
        path = Path(image)
        name = path.name.replace("leftImg8bit", "gtFine_instanceIds")
        annotation = Path(self.metadata.gt_dir, path.parent.name, name)
        if not annotation.is_file():
            raise UserError(f"{self.dataset_name} lacks the annotation {annotation} of {image}.")
        return annotation


def count_overlaps(
    masks: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray,
    annotated: np.ndarray,
    labels: Sequence[int],
) -> list[Overlaps]:
    """The overlaps of one image, for each class.

    Args:
        masks: (P, H, W) bool; empty ones are left out.
        classes: (P,) int, indices into ``labels``.
        scores: (P,) float.
        annotated: (H, W) int64 instance ids.
        labels: Cityscapes' label id of each class.
    """
    ids, region = np.unique(annotated, return_inverse=True)
    region = region.reshape(annotated.shape)
    areas = np.bincount(region.ravel(), minlength=len(ids))
    shared = np.array([np.bincount(region[mask], minlength=len(ids)) for mask in masks], np.int64)
    shared = shared.reshape(len(masks), len(ids))
    sizes, void = shared.sum(axis=1), shared[:, np.isin(ids, VOID)].sum(axis=1)
    label_of = np.where(ids >= 1000, ids // 1000, ids)
    overlaps = []
    for index, label in enumerate(labels):
        mine, theirs = (classes == index) & (sizes > 0), label_of == label
        overlaps.append(
            Overlaps(
                scores[mine].astype(np.float64),
                sizes[mine],
                void[mine],
                ids[theirs],
                areas[theirs],
                shared[mine][:, theirs],
            )
        )
    return overlaps


def average_precision(images: Sequence[Overlaps], threshold: float) -> float:
    """AP of one class over some images, in [0, 1]; NaN where there is no object to find.

    A prediction whose IoU with an instance exceeds ``threshold`` matches it. Of several matches,
    the one with the highest score is right and the others are wrong. A prediction that matches no
    instance is wrong, unless more than ``threshold`` of its pixels lie on void, group or tiny
    regions.
    """
    right: list[float] = []
    wrong: list[float] = []
    missed = 0
    predicted = False
    for image in images:
        predicted |= len(image.scores) > 0
        group, tiny = image.ids < 1000, image.areas < MIN_PIXELS
        union = image.areas + image.sizes[:, None] - image.shared
        matches = image.shared > threshold * union
        for column in np.flatnonzero(~group & ~tiny):
            finders = np.sort(image.scores[matches[:, column]])
            if len(finders):
                right.append(finders[-1])
                wrong.extend(finders[:-1])
            else:
                missed += 1
        excused = image.void + image.shared @ (group.astype(np.int64) + tiny)
        alone = ~matches.any(axis=1) & (excused <= threshold * image.sizes)
        wrong.extend(image.scores[alone])
    if not right and not missed:
        return float("nan")
    if not predicted or not right:
        return 0.0
    scores = np.unique(np.array(right + wrong))
    tp, fp = ((np.array(s)[:, None] >= scores).sum(axis=0) for s in (right, wrong))
    precision = np.append(tp / (tp + fp), 1.0)
    recall = np.append(tp / (len(right) + missed), 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (padded[:-2] - padded[2:]) / 2)


def _percent(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return 100 * float(values.mean()) if values.size else float("nan")

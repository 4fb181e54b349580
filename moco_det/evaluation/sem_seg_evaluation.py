"""Mean intersection over union of semantic segmentation.

Long et al. 2015, "Fully Convolutional Networks for Semantic Segmentation", section 5; as in
VOC's and Cityscapes' own scripts, a class that is predicted but never annotated counts as 0.
Detectron2's evaluator breaks on numpy 2 and keeps every prediction in memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from moco_common.errors import UserError
from moco_det.data.datasets.label_files import read_labels
from moco_det.evaluation.gather import images_once, shares_of_ranks


class SemanticEvaluator(DatasetEvaluator):
    """mIoU of a registered data set of images and label files.

    Args:
        dataset_name: a data set whose metadata hold ``stuff_classes`` and ``ignore_label``.
        distributed: whether the counts of all ranks are added up; all must then call it.
    """

    def __init__(self, dataset_name: str, *, distributed: bool = True) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self.dataset_name = dataset_name
        self.classes = list(metadata.stuff_classes)
        self.ignore_label = metadata.ignore_label
        self.label_files = {
            record["file_name"]: record["sem_seg_file_name"]
            for record in DatasetCatalog.get(dataset_name)
        }
        self.distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Clear the counts."""
        # For each image: its file and its sparse confusion matrix, as flat indices and counts.
        self.counted: list[tuple[str, np.ndarray, np.ndarray]] = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Count the pixels of some images.

        Args:
            inputs: each with ``file_name``.
            outputs: each with ``sem_seg``, (classes, H, W) logits at the image's own size, or None
                for an image that could not be read: none of its pixels is right.

        Raises:
            UserError: labels of another size, or outside the data set's classes.
        """
        for example, output in zip(inputs, outputs, strict=True):
            path = self.label_files[example["file_name"]]
            labels, logits = read_labels(path), output["sem_seg"]
            if logits is None:
                predicted = np.full(labels.shape, len(self.classes))
            else:
                predicted = logits.argmax(dim=0).cpu().numpy()
            counts = confusion(labels, predicted, len(self.classes), self.ignore_label, path)
            filled = np.flatnonzero(counts)
            self.counted.append((example["file_name"], filled, counts.flat[filled]))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return ``{"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC", "IoU-<class>", ...}}`` in percent
        on the first rank, and ``{}`` elsewhere. IoU is NaN for a class that is neither annotated
        nor predicted. An image that two ranks have seen counts once.

        Raises:
            UserError: an image was not evaluated, or is not of the data set.
        """
        shares = shares_of_ranks(self.counted, self.distributed)
        if shares is None:
            return {}
        counted = [image for share in shares for image in share]
        # Annotated x predicted.
        total = np.zeros((len(self.classes), len(self.classes) + 1), dtype=np.int64)
        for index in images_once(self.dataset_name, [c[0] for c in counted], self.label_files):
            _, filled, counts = counted[index]
            total.flat[filled] += counts
        return {"sem_seg": scores(total, self.classes)}


def confusion(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, ignore_label: int, name: str = ""
) -> np.ndarray:
    """(num_classes, num_classes + 1) int64 counts of pixels, annotated by predicted class.

    Args:
        labels: (H, W) int, in [0, num_classes) or ``ignore_label``, which is not counted.
        predicted: (H, W) int in [0, num_classes], the last where nothing was predicted.
        name: the file of the labels, for errors.

    Raises:
        UserError: the two sizes differ, or a label is not a class.
    """
    if labels.shape != predicted.shape:
        raise UserError(
            f"{name} has the size {labels.shape}, its image {predicted.shape} (height, width): "
            "labels belong to the image as it is stored."
        )
    counted = labels != ignore_label
    labels, predicted = labels[counted], predicted[counted]
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise UserError(
            f"{name} has the label {wrong}, but the classes are {num_classes}, counted from 0, "
            f"and {ignore_label} for what is not counted."
        )
    shape = num_classes, num_classes + 1
    pairs = np.ravel_multi_index((labels.astype(np.int64), predicted), shape)
    return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)


def scores(counts: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Metrics in percent of a confusion matrix (see `confusion`); see ``evaluate``."""
    right = counts.diagonal().astype(np.float64)
    annotated = counts.sum(axis=1).astype(np.float64)
    union = annotated + counts.sum(axis=0)[: len(right)] - right
    with np.errstate(invalid="ignore"):  # 0 / 0: NaN, there was nothing to find
        iou = 100 * right / union
        accuracy = 100 * right / annotated
    total = annotated.sum()
    return {
        "mIoU": _mean(iou),
        "fwIoU": float(np.nansum(iou * annotated) / total) if total else float("nan"),
        "mACC": _mean(accuracy),
        "pACC": float(100 * right.sum() / total) if total else float("nan"),
        **{f"IoU-{name}": float(value) for name, value in zip(classes, iou, strict=True)},
    }


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")

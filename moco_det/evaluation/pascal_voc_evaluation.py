"""The VOC evaluator: Detectron2's interface around :mod:`moco_det.evaluation.pascal_voc_ap`."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from moco_common.errors import UserError
from moco_common.files import write_json_atomically
from moco_det.evaluation.gather import (
    PREDICTIONS_FILE,
    images_once,
    report_absent,
    shares_of_ranks,
)
from moco_det.evaluation.pascal_voc_ap import (
    METRICS,
    THRESHOLDS,
    Detections,
    GroundTruth,
    as_printed,
    average_precisions,
    to_voc_corners,
)


class _Share(NamedTuple):
    """The predictions of one process, in a few large arrays that are gathered quickly."""

    images: list[Any]
    counts: list[int]  # detections of each image
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class VOCEvaluator(DatasetEvaluator):
    """VOC AP, AP50, AP75 and per-class AP, equal to Detectron2's evaluator to the last bit.

    Works on Detectron2's own VOC data sets (objects from their XML files) and on ``voc:`` data.
    Writes the predictions and ``voc_results.json`` (AP of each class at each IoU threshold).

    In own data, a class without a countable object has AP NaN and is left out of the means; in
    Detectron2's own data sets it has the value that Detectron2 gives it (see
    :func:`moco_det.evaluation.pascal_voc_ap.average_precisions`). VOC's test sets have no such
    class.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | os.PathLike[str] | None = None,
        distributed: bool = True,
        metric: str | None = None,
    ) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        year = metadata.get("year")
        self._as_upstream = year is not None
        self.metric = metric or ("11-point" if year == 2007 else "all-point")
        if self.metric not in METRICS:
            raise UserError(f"'{metric}' is not a VOC metric: use one of {', '.join(METRICS)}")
        self._name = dataset_name
        self._classes: list[str] = list(metadata.thing_classes)
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._distributed = distributed
        self._truth: tuple[list[Any], GroundTruth] | None = None
        self.reset()

    def reset(self) -> None:
        self._images: list[Any] = []
        self._boxes: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"]
            self._images.append(image["image_id"])
            self._boxes.append(instances.pred_boxes.tensor.cpu().numpy())
            self._scores.append(instances.scores.cpu().numpy())
            self._labels.append(instances.pred_classes.cpu().numpy())

    def evaluate(self) -> dict[str, dict[str, float]]:
        share = _Share(
            self._images,
            [len(scores) for scores in self._scores],
            np.concatenate(self._boxes or [np.zeros((0, 4), np.float32)]),
            np.concatenate(self._scores or [np.zeros(0, np.float32)]),
            np.concatenate(self._labels or [np.zeros(0, np.int64)]),
        )
        shares = shares_of_ranks(share, self._distributed)
        if shares is None:
            return {}
        if self._truth is None:
            self._truth = _ground_truth(self._name, self._classes)
        ids, truth = self._truth
        names = [name for share in shares for name in share.images]
        chosen = images_once(self._name, names, ids)  # in the data set's order, whatever the shares
        counts = np.array([count for share in shares for count in share.counts], dtype=np.int64)
        starts = counts.cumsum() - counts
        order = np.concatenate(
            [np.arange(starts[i], starts[i] + counts[i]) for i in chosen] or [np.zeros(0, int)]
        )
        image = np.repeat(np.arange(len(ids)), counts[chosen])
        boxes = np.concatenate([share.boxes for share in shares])[order]
        scores = np.concatenate([share.scores for share in shares])[order]
        labels = np.concatenate([share.labels for share in shares])[order].astype(np.int64)
        if self._output_dir is not None:
            self._write_predictions(ids, image, boxes, scores, labels)
        found = Detections(image, labels, to_voc_corners(boxes), as_printed(scores, 3))
        precisions = average_precisions(truth, found, len(self._classes), metric=self.metric)
        return self._results(precisions * 100, truth)

    def _results(self, precisions: np.ndarray, truth: GroundTruth) -> dict[str, dict[str, float]]:
        """Means of ``precisions``, (T, C) in percent."""
        used = np.ones(len(self._classes), dtype=bool)
        if not self._as_upstream:
            used = np.bincount(truth.label[~truth.difficult], minlength=len(used)) > 0
            precisions[:, ~used] = np.nan
            report_absent(self._name, self._classes, np.flatnonzero(~used).tolist())
        # Row by row, and then over the rows: the order in which upstream adds up.
        means = [float(np.mean(row[used])) if used.any() else float("nan") for row in precisions]
        results: OrderedDict[str, float] = OrderedDict(
            AP=float(np.mean(means)),
            AP50=means[THRESHOLDS.index(0.5)],
            AP75=means[THRESHOLDS.index(0.75)],
        )
        for name, column in zip(self._classes, precisions.T, strict=True):
            results[f"AP-{name}"] = float(np.mean(column))
        if self._output_dir is not None:
            table = [
                [None if np.isnan(v) else v for v in column] for column in precisions.T.tolist()
            ]
            content = {
                "dataset": self._name,
                "metric": self.metric,
                "thresholds": THRESHOLDS,
                "AP": dict(zip(self._classes, table, strict=True)),
            }
            write_json_atomically(self._output_dir / "voc_results.json", content)
        return OrderedDict(bbox=results)

    def _write_predictions(
        self,
        ids: list[Any],
        image: np.ndarray,
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        """Write COCO's result format; ``category_id`` is the index of the class."""
        assert self._output_dir is not None
        sized = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        rows = zip(image.tolist(), labels.tolist(), sized.tolist(), scores.tolist(), strict=True)
        content = [
            {"image_id": ids[i], "category_id": label, "bbox": box, "score": score}
            for i, label, box, score in rows
        ]
        write_json_atomically(self._output_dir / PREDICTIONS_FILE, content)


def _ground_truth(dataset_name: str, classes: list[str]) -> tuple[list[Any], GroundTruth]:
    """Image ids in the data set's order, and the objects in VOC corners."""
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("year") is None:
        records = DatasetCatalog.get(dataset_name)
        ids = [record["image_id"] for record in records]
        rows = [
            (index, item["category_id"], *item["bbox"], item["difficult"])
            for index, record in enumerate(records)
            for item in record["annotations"]
        ]
        offset = np.array([1.0, 1.0, 0.0, 0.0])  # back to VOC's corners
    else:
        ids, rows = _rows_from_xml(Path(metadata.dirname), metadata.split, classes)
        offset = np.zeros(4)
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 7)
    return ids, GroundTruth(
        image=table[:, 0].astype(np.int64),
        label=table[:, 1].astype(np.int64),
        boxes=table[:, 2:6] + offset,
        difficult=table[:, 6] != 0,
    )


def _rows_from_xml(
    folder: Path, split: str, classes: list[str]
) -> tuple[list[str], list[tuple[float, ...]]]:
    """(image, class, x0, y0, x1, y1, difficult) of each object: its dicts lack ``difficult``."""
    index = {name: number for number, name in enumerate(classes)}
    ids = (folder / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    rows: list[tuple[float, ...]] = []
    for image, image_id in enumerate(ids):
        root = ET.fromstring((folder / "Annotations" / f"{image_id}.xml").read_bytes())
        for obj in root.findall("object"):
            label = index.get(obj.findtext("name", ""))
            box = obj.find("bndbox")
            if label is not None and box is not None:
                corners = (float(box.findtext(c, "")) for c in ("xmin", "ymin", "xmax", "ymax"))
                rows.append((image, label, *corners, int(obj.findtext("difficult", "0"))))
    return ids, rows

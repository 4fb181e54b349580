"""The objects of one image, annotated or detected: reading, matching, the threshold to show."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from numpy.typing import NDArray
from pycocotools import mask as mask_codec

from moco_det.datasets import register
from moco_det.errors import UserError

MATCH_IOU = 0.5

Predictions = dict[str, list[dict[str, Any]]]  # COCO's results by image id as text


@dataclass
class Objects:
    """The objects of one image, annotated or detected.

    Attributes:
        boxes: (N, 4) float, x0 y0 x1 y1 in pixels.
        classes: (N,) int, indices of the class names.
        scores: (N,) in [0, 1], or None for annotations.
        masks: (N, H, W) bool, or None.
        ignored: (N,) bool, annotations that are neither to be found nor wrong (crowds, difficult
            objects), or None.
    """

    boxes: NDArray[np.floating]
    classes: NDArray[np.integer]
    scores: NDArray[np.floating] | None = None
    masks: NDArray[np.bool_] | None = None
    ignored: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def areas(self) -> NDArray[np.floating]:
        """(N,) pixels of the boxes."""
        return _areas(self.boxes)

    def scores_or_zero(self) -> NDArray[np.floating]:
        """(N,) scores; zeros for annotations."""
        return np.zeros(len(self)) if self.scores is None else self.scores

    def ignored_or_none(self) -> NDArray[np.bool_]:
        """(N,) bool; False where nothing is ignored."""
        return np.zeros(len(self), dtype=bool) if self.ignored is None else self.ignored

    def select(self, chosen: NDArray[Any]) -> "Objects":
        """Those at the indices (or where the mask is true)."""
        more = (p if p is None else p[chosen] for p in (self.scores, self.masks, self.ignored))
        return Objects(self.boxes[chosen], self.classes[chosen], *more)


def assign(
    detections: Objects, truth: Objects, iou: float = MATCH_IOU, any_class: bool = False
) -> NDArray[np.int64]:
    """Which annotation each detection takes: (N,) indices, -1 for none.

    By falling score each takes the free annotation of its class (of any, with `any_class`) with
    the largest IoU of at least `iou`. Ignored annotations can be taken any number of times, after
    the others.
    """
    taken = np.full(len(detections), -1)
    if not len(truth) or not len(detections):
        return taken
    ignored = truth.ignored_or_none()
    overlaps = box_iou(detections.boxes, truth.boxes)
    if not any_class:
        overlaps[detections.classes[:, None] != truth.classes] = 0
    free = np.ones(len(truth), dtype=bool)
    for index in np.argsort(-detections.scores_or_zero(), kind="stable"):
        for candidates in (free & ~ignored, ignored):
            best = int(np.argmax(np.where(candidates, overlaps[index], -1.0)))
            if candidates[best] and overlaps[index, best] >= iou:
                taken[index] = best
                free[best] = False
                break
    return taken


def match(detections: Objects, truth: Objects, iou: float = MATCH_IOU) -> NDArray[np.bool_]:
    """Which detections are right, as :func:`assign` pairs them: (N,) bool."""
    return assign(detections, truth, iou) >= 0


def box_iou(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """Pairwise IoU of (N, 4) and (M, 4) boxes: (N, M)."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    union = _areas(a)[:, None] + _areas(b) - shared
    iou: NDArray[np.floating] = shared / np.maximum(union, 1e-9)
    return iou


def _areas(boxes: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.multiply(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])


def best_threshold(pairs: Iterable[tuple[Objects, Objects]]) -> float:
    """The score at and above which (detections, truth) pairs give the best F1 at IoU 0.5.

    Models differ in how high they score; at its own best threshold each is shown as it would be
    used. 0.5 where nothing is right at any threshold.
    """
    scores, right, wanted = [], [], 0
    for detections, truth in pairs:
        scores.append(detections.scores_or_zero())
        right.append(match(detections, truth))
        wanted += int((~truth.ignored_or_none()).sum())
    return threshold_of_best_f1(scores, right, wanted)


def threshold_of_best_f1(
    scores: Sequence[NDArray[np.floating]], right: Sequence[NDArray[np.bool_]], wanted: int
) -> float:
    """:func:`best_threshold` of detections that are matched already, image by image."""
    flat = np.concatenate(scores) if scores else np.zeros(0)
    order = np.argsort(-flat, kind="stable")
    hits = np.cumsum(np.concatenate(right)[order]) if scores else np.zeros(0)
    if not len(hits) or not hits[-1]:
        return 0.5
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + wanted)
    return float(flat[order][int(np.argmax(f1))])


def predictions_file(run: str | Path) -> Path:
    """Where an evaluated run keeps its predictions."""
    return Path(run) / "inference" / "coco_instances_results.json"


def has_predictions(run: str | Path) -> bool:
    """Whether a run kept its predictions."""
    return predictions_file(run).is_file()


def read_predictions(run: str | Path) -> Predictions:
    """The predictions that an evaluated run kept, by image id (as text).

    Raises:
        UserError: there are none, or the file is not COCO's list of results.
    """
    file = predictions_file(run)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        by_image: Predictions = {}
        for result in results:
            by_image.setdefault(str(result["image_id"]), []).append(result)
    except OSError as error:
        raise UserError(f"{run} keeps no predictions ({file}): evaluate it first") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is not a list of COCO results: evaluate the run again") from error
    return by_image


@dataclass
class OpenDataset:
    """A data set as reports and pictures read it.

    Attributes:
        records: Detectron2's dataset dicts.
        class_names: C of them.
        ids: category id of the predictions -> class index; None where they are one.
    """

    records: Sequence[Mapping[str, Any]]
    class_names: Sequence[str]
    ids: Mapping[int, int] | None = None

    def detections(self, record: Mapping[str, Any], predictions: Predictions) -> Objects:
        """What a run found in one image."""
        return detected_objects(predictions.get(str(record["image_id"]), []), self.ids)


def open_dataset(
    dataset: str | Sequence[Mapping[str, Any]], class_names: Sequence[str] | None = None
) -> OpenDataset:
    """Open a registered name, a `voc:` or `coco:` text, or Detectron2's dataset dicts.

    Args:
        class_names: in the order of the classifier; by default the data set's own.

    Raises:
        UserError: the data set cannot be read.
    """
    if isinstance(dataset, str):
        name = register(dataset, class_names)
        metadata = MetadataCatalog.get(name)
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        names = metadata.get("thing_classes", class_names)
        return OpenDataset(DatasetCatalog.get(name), list(names or []), ids)
    records = list(dataset)
    if class_names is None:
        most = max((a["category_id"] for r in records for a in r.get("annotations", ())), default=0)
        class_names = [f"class {index}" for index in range(most + 1)]
    return OpenDataset(records, class_names)


def annotated_objects(record: Mapping[str, Any], masks: bool = False) -> Objects:
    """The annotations of one of Detectron2's dataset dicts."""
    found = record.get("annotations", [])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in found]
    return Objects(
        np.array(boxes, dtype=float).reshape(-1, 4),
        np.array([a["category_id"] for a in found], dtype=int),
        masks=_masks(found, record["height"], record["width"]) if masks else None,
        ignored=np.array([bool(a.get("iscrowd") or a.get("difficult")) for a in found], dtype=bool),
    )


def detected_objects(
    found: Sequence[Mapping[str, Any]], ids: Mapping[int, int] | None = None, masks: bool = False
) -> Objects:
    """The objects of one image in COCO's result format; `ids` maps category ids to classes."""
    boxes = np.array([r["bbox"] for r in found], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    classes = [r["category_id"] if ids is None else ids[r["category_id"]] for r in found]
    scores = np.array([r["score"] for r in found], dtype=float)
    return Objects(boxes, np.array(classes, dtype=int), scores, _masks(found) if masks else None)


def _masks(
    found: Sequence[Mapping[str, Any]], height: int = 0, width: int = 0
) -> NDArray[np.bool_] | None:
    """Masks from COCO segmentations: polygons, or run lengths in either form."""
    if not found or not all(item.get("segmentation") for item in found):
        return None
    decoded = []
    for item in found:
        code = item["segmentation"]
        if isinstance(code, list):
            code = mask_codec.merge(mask_codec.frPyObjects(code, height, width))
        elif isinstance(code["counts"], list):
            code = mask_codec.frPyObjects(code, *code["size"])
        decoded.append(mask_codec.decode(code).astype(bool))
    return np.stack(decoded)

"""Reading stored predictions and the data sets they belong to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from numpy.typing import NDArray
from pycocotools import mask as mask_codec

from moco_common.errors import UserError
from moco_common.files import read_json
from moco_det.data.register import register
from moco_det.report.runs import is_number
from moco_det.structures.objects import Objects

Predictions = dict[str, list[dict[str, Any]]]  # COCO's results by image id as text


def predictions_file(run: str | Path) -> Path:
    """The file in which an evaluated run keeps its predictions."""
    return Path(run) / "inference" / "coco_instances_results.json"


def has_predictions(run: str | Path) -> bool:
    """Return True if a run kept its predictions."""
    return predictions_file(run).is_file()


def read_predictions(run: str | Path) -> Predictions:
    """Read the predictions of an evaluated run, by image id (as text).

    Raises:
        UserError: the file is missing, or is not a list of COCO results.
    """
    file = predictions_file(run)
    try:
        results = read_json(file)
        by_image: Predictions = {}
        for result in results:
            _check(result)
            by_image.setdefault(str(result["image_id"]), []).append(result)
    except OSError as error:
        raise UserError(f"{run} keeps no predictions ({file}): evaluate it first") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is not a list of COCO results: evaluate the run again") from error
    return by_image


def _check(result: Mapping[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError for what is no detection with a box."""
    if not isinstance(result["category_id"], int) or not isinstance(result["image_id"], int | str):
        raise TypeError("an id is of another type")
    str(result["image_id"]).encode()
    if len(result["bbox"]) != 4 or not all(map(is_number, (*result["bbox"], result["score"]))):
        raise ValueError("a box or a score is not made of numbers")


@dataclass
class OpenDataset:
    """A data set, opened for reports and pictures.

    Attributes:
        records: Detectron2's dataset dicts.
        class_names: C names.
        ids: category id of the predictions -> class index; None where they are equal.
    """

    records: Sequence[Mapping[str, Any]]
    class_names: Sequence[str]
    ids: Mapping[int, int] | None = None

    def detections(self, record: Mapping[str, Any], predictions: Predictions) -> Objects:
        """The detections of a run in one image.

        Raises:
            UserError: a category is no class of the data set.
        """
        found = predictions.get(str(record["image_id"]), [])
        known = range(len(self.class_names)) if self.ids is None else self.ids
        for result in found:
            if result["category_id"] not in known:
                raise UserError(
                    f"category {result['category_id']} of the detections is not in the data set: "
                    "evaluate the run on it again"
                )
        return detected_objects(found, self.ids)


def open_dataset(
    dataset: str | Sequence[Mapping[str, Any]],
    class_names: Sequence[str] | None = None,
    masks: bool = True,
) -> OpenDataset:
    """Open a registered name, a `voc:` or `coco:` text, or Detectron2's dataset dicts.

    Args:
        class_names: in the order of the classifier; default: those of the data set.
        masks: whether masks are wanted; without, no object is left out for its mask.

    Raises:
        UserError: the data set cannot be read.
    """
    if isinstance(dataset, str):
        name = register(dataset, class_names, masks=masks)
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
    """Decode COCO segmentations: polygons, or run lengths in either form."""
    if not found or not all(item.get("segmentation") for item in found):
        return None
    decoded = []
    for item in found:
        code = item["segmentation"]
        try:
            if isinstance(code, list):
                code = mask_codec.merge(mask_codec.frPyObjects(code, height, width))
            elif isinstance(code["counts"], list):
                code = mask_codec.frPyObjects(code, *code["size"])
            decoded.append(mask_codec.decode(code).astype(bool))
        except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise UserError(f"a mask is not readable ({error}): evaluate the run again") from error
    return np.stack(decoded)

"""The COCO evaluator: Detectron2's, made to work for data sets without a COCO file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm

from .checks import check_images, write_json_atomically
from .errors import UserError


class InstanceEvaluator(COCOEvaluator):
    """COCO box and mask AP by pycocotools, through Detectron2's evaluator.

    Own data sets are evaluated on what their reader kept: their objects go to a COCO file in
    ``output_dir`` that is named by its content, so that one of other data is never used.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        tasks: Sequence[str] | None = None,
        output_dir: str | os.PathLike[str],
        distributed: bool = True,
    ) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._gathers = distributed
        self._expected: list[Any] | None = None
        self._areas: np.ndarray | None = None
        evaluated = dataset_name
        if metadata.get("json_file") is None:
            if tasks is None and not metadata.has_masks:
                tasks = ("bbox",)
            if "segm" in (tasks or ()) and not metadata.has_masks:
                raise UserError(f"{dataset_name} has no masks: it cannot be evaluated for 'segm'")
            content = coco_ground_truth(dataset_name)
            self._expected = [image["id"] for image in content["images"]]
            self._areas = np.array(
                [item["area"] for item in content["annotations"] if not item["iscrowd"]]
            )
            evaluated = _with_json_file(dataset_name, content, Path(output_dir))
        super().__init__(
            evaluated,
            tasks=None if tasks is None else tuple(tasks),
            distributed=distributed,
            output_dir=str(output_dir),
            use_fast_impl=False,  # the compiled one is unofficial, and often not there
        )

    def reset(self) -> None:
        super().reset()
        self._seen: list[Any] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        super().process(inputs, outputs)
        self._seen.extend(image["image_id"] for image in inputs)

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> dict[str, dict[str, float]]:
        shares = comm.gather(self._seen, dst=0) if self._gathers else [self._seen]
        if not self._gathers or comm.is_main_process():
            expected = self._expected if img_ids is None else None
            check_images(
                self._dataset_name, (image for share in shares for image in share), expected
            )
        results = super().evaluate(img_ids)
        if self._areas is not None and len(self._areas):
            for metrics in results.values():
                self._zero_without_detections(metrics)
        return results

    def _zero_without_detections(self, metrics: dict[str, float]) -> None:
        """Upstream gives NaN for everything if nothing at all was detected; the AP is 0 then."""
        if not all(np.isnan(value) for value in metrics.values()):
            return
        assert self._areas is not None
        small, large = 32**2, 96**2  # COCO's sizes, both limits inclusive
        present = {
            "APs": (self._areas <= small).any(),
            "APm": ((self._areas >= small) & (self._areas <= large)).any(),
            "APl": (self._areas >= large).any(),
        }
        for key in metrics:
            if present.get(key, True):
                metrics[key] = 0.0


def coco_ground_truth(dataset_name: str) -> dict[str, Any]:
    """A registered data set as the content of a COCO file.

    Unlike Detectron2's ``convert_to_coco_dict`` it keeps boxes unrounded, and the area that the
    data state, which decides between small, medium and large.
    """
    metadata = MetadataCatalog.get(dataset_name)
    to_index = metadata.get("thing_dataset_id_to_contiguous_id")
    to_id = {index: key for key, index in to_index.items()} if to_index else {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in DatasetCatalog.get(dataset_name):
        images.append(
            {
                "id": record["image_id"],
                "width": record["width"],
                "height": record["height"],
                "file_name": record["file_name"],
            }
        )
        for item in record["annotations"]:
            box = BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYWH_ABS)
            annotation = {
                "id": len(annotations) + 1,  # 0 would stand for "no match" in the COCO API
                "image_id": record["image_id"],
                "category_id": to_id.get(item["category_id"], item["category_id"]),
                "bbox": [float(value) for value in box],
                "area": float(item.get("area", box[2] * box[3])),
                "iscrowd": int(item.get("iscrowd", 0)),
            }
            if "segmentation" in item:
                annotation["segmentation"] = item["segmentation"]
            annotations.append(annotation)
    categories = [
        {"id": to_id.get(index, index), "name": name}
        for index, name in enumerate(metadata.thing_classes)
    ]
    return {"info": {}, "images": images, "categories": categories, "annotations": annotations}


def _with_json_file(dataset_name: str, content: dict[str, Any], folder: Path) -> str:
    """Write ``content`` and return the name of metadata that point to it.

    Detectron2's evaluator would set ``json_file`` in the data set's own metadata, and use that
    file for every later evaluation in the process, wherever its results go.
    """
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    path = folder / f"{dataset_name}_ground_truth_{digest}.json"
    if not path.is_file():
        write_json_atomically(path, content)
    metadata = MetadataCatalog.get(dataset_name)
    name = f"{dataset_name}_ground_truth"
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    MetadataCatalog.get(name).set(
        json_file=str(path),
        thing_classes=metadata.thing_classes,
        **({"thing_dataset_id_to_contiguous_id": ids} if ids else {}),
    )
    return name

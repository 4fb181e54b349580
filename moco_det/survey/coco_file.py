"""Conversion of a registered data set to COCO annotation files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_common.errors import UserError
from moco_common.files import read_json, write_json_atomically
from moco_det.data.shares import Share
from moco_det.evaluation.coco_evaluation import coco_content

CONTRIBUTOR = "moco-data"  # by which a later run knows its own file
EXACT = 2**53  # the largest whole number that every reader of JSON keeps


def convert_to_coco(name: str, file: Path, share: Share | None) -> dict[Path, int]:
    """Write a data set as a COCO file or, with a share, as FILE-train.json and FILE-val.json.

    Images are named by their path relative to the file. Ids that are text or too large are
    replaced by 1, 2, ...; category ids are those of a COCO file, and 1, 2, ... for other formats.

    Returns:
        Each file -> its number of images.

    Raises:
        UserError: a part of the split has no image, or a file would be replaced that this tool did
            not write.
    """
    records = DatasetCatalog.get(name)
    parts = {file: records}
    if share is not None:
        parts = {
            file.with_name(f"{file.stem}-{part}.json"): side.of(records)
            for part, side in (("train", share), ("val", share._replace(rest=True)))
        }
    for path, chosen in parts.items():
        if not chosen:
            raise UserError(
                f"{path} would have none of the {len(records)} images: choose another --split."
            )
        _check_own(path)
    ids = _image_ids(records)
    for path, chosen in parts.items():
        write_json_atomically(path, _content(name, chosen, ids, path))
    return {path: len(chosen) for path, chosen in parts.items()}


def _check_own(file: Path) -> None:
    """Refuse to replace a file that another program, or a person, wrote."""
    if not file.exists():
        return
    try:
        own = read_json(file)["info"]["contributor"] == CONTRIBUTOR
    except (OSError, ValueError, TypeError, KeyError):
        own = False
    if not own:
        raise UserError(
            f"{file} was not written by this tool and is not replaced: choose another name"
        )


def _content(
    name: str, records: Sequence[Mapping[str, Any]], ids: Mapping[Any, int], file: Path
) -> dict[str, Any]:
    metadata = MetadataCatalog.get(name)
    skeleton = _skeleton(metadata)
    names = len(skeleton.get("keypoints", ()))
    content = coco_content(records, _class_ids(metadata), names)
    for image in content["images"]:
        image["id"] = ids[image["id"]]
        below = os.path.relpath(image["file_name"], file.absolute().parent)
        image["file_name"] = below.replace(os.sep, "/")
    for annotation in content["annotations"]:
        annotation["image_id"] = ids[annotation["image_id"]]
    for category in content["categories"]:
        category |= skeleton
    content["info"] = {"description": f"converted from {name}", "contributor": CONTRIBUTOR}
    return content


def _image_ids(records: Sequence[Mapping[str, Any]]) -> dict[Any, int]:
    """The data set's own ids where all are whole numbers that every reader keeps, else 1, 2, ..."""
    own = [record["image_id"] for record in records]
    if all(isinstance(key, int) and abs(key) <= EXACT for key in own):
        return {key: key for key in own}
    return {key: number for number, key in enumerate(own, start=1)}


def _class_ids(metadata: Any) -> dict[int, str]:
    """Category id -> class name, in the order of the classes."""
    classes = list(metadata.thing_classes)
    index = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    ids = sorted(index, key=index.__getitem__)
    if len(ids) != len(classes) or min(ids) < 1 or max(ids) > EXACT:
        ids = list(range(1, len(classes) + 1))
    return dict(zip(ids, classes, strict=True))


def _skeleton(metadata: Any) -> dict[str, Any]:
    """The keypoints of a category, if the data have any."""
    names = list(metadata.get("keypoint_names") or ())
    if not names:
        return {}
    bones = metadata.get("keypoint_connection_rules") or ()
    pairs = [[names.index(a) + 1, names.index(b) + 1] for a, b, _ in bones]
    return {"keypoints": names, "skeleton": pairs}

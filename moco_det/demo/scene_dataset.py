"""The demo's data set: generated images written in PASCAL VOC and COCO layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import cv2
import numpy as np
from numpy.typing import NDArray

from moco_common.errors import UserError
from moco_common.files import read_json
from moco_det.demo.scenes import CLASSES, SceneObject, draw_portrait, draw_scene

Record = dict[str, Any]  # a scene, or an object of a COCO file
SPLITS = ("unlabelled", "train", "test")


def write_scenes(
    root: Path,
    *,
    unlabelled: int = 4000,
    train: int = 300,
    test: int = 200,
    size: int = 128,
    seed: int = 0,
    processes: int = 2,
) -> Iterator[tuple[int, int]]:
    """Write the data set under ``root``, yielding (images written, total) after each image.

    Layout::

        root/unlabelled/*.jpg                                          images for pre-training
        root/voc/{Annotations,ImageSets/Main,JPEGImages}               splits train and test
        root/coco/instances_{train,test}.json                          the same with masks as RLE
        root/scenes.json                                               the parameters; at first null

    The same arguments give the same files, whatever the number of processes. A folder whose
    scenes.json holds these arguments is left as it is; an unfinished one is started again.
    """
    parameters: dict[str, object] = {
        "unlabelled": unlabelled,
        "train": train,
        "test": test,
        "size": size,
    }
    parameters |= {"seed": seed, "classes": list(CLASSES), "generation": 2}
    stamp = root / "scenes.json"
    total = unlabelled + train + test
    if stamp.exists() and _recorded(stamp) == parameters:
        yield total, total
        return
    if root.exists() and any(root.iterdir()) and not stamp.exists():
        raise UserError(
            f"{root} holds other files, which would be lost: choose another --output-dir"
        )
    root.mkdir(parents=True, exist_ok=True)
    stamp.write_text("null")
    for name in ("unlabelled", "voc", "coco"):
        shutil.rmtree(root / name, ignore_errors=True)
    for folder in ("unlabelled", "voc/Annotations", "voc/ImageSets/Main", "voc/JPEGImages", "coco"):
        (root / folder).mkdir(parents=True)
    counts = dict(zip(SPLITS, (unlabelled, train, test), strict=True))
    jobs = [(split, i) for split in SPLITS for i in range(counts[split])]
    records: dict[str, list[Record]] = {"train": [], "test": []}
    with ProcessPoolExecutor(processes) as pool:
        write = partial(_write_scene, root, size, seed)
        for done, ((split, _), record) in enumerate(
            zip(jobs, pool.map(write, jobs, chunksize=32), strict=True), start=1
        ):
            if split != "unlabelled":
                records[split].append(record)
            yield done, total
    for split, scenes in records.items():
        names = "".join(f"{scene['name']}\n" for scene in scenes)
        (root / "voc" / "ImageSets" / "Main" / f"{split}.txt").write_text(names)
        (root / "coco" / f"instances_{split}.json").write_text(json.dumps(_coco(scenes, size)))
    stamp.write_text(json.dumps(parameters))


def _recorded(stamp: Path) -> Any:
    """Return the parameters in a scenes.json."""
    try:
        return read_json(stamp)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {stamp} ({error}): remove the folder or choose another --output-dir."
        ) from None


def _write_scene(root: Path, size: int, seed: int, job: tuple[str, int]) -> Record:
    split, index = job
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    portrait = split == "unlabelled"
    image, objects = (draw_portrait(rng), []) if portrait else draw_scene(rng, size)
    name = f"{split}_{index:05d}"
    encoded = cv2.imencode(".jpg", image[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 92))[1].tobytes()
    if portrait:
        (root / "unlabelled" / f"{name}.jpg").write_bytes(encoded)
        return {}
    (root / "voc" / "JPEGImages" / f"{name}.jpg").write_bytes(encoded)
    annotation = _voc_xml(f"{name}.jpg", size, objects)
    (root / "voc" / "Annotations" / f"{name}.xml").write_text(annotation)
    instances = [
        {
            "category_id": obj.category + 1,
            "bbox": [obj.box[0], obj.box[1], obj.box[2] - obj.box[0], obj.box[3] - obj.box[1]],
            "area": int(obj.mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": [size, size], "counts": _run_lengths(obj.mask)},
        }
        for obj in objects
    ]
    return {"name": name, "instances": instances}


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed RLE: lengths of runs in column order, starting with background."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = np.concatenate([[0] if not flat[0] else [0, 0], changes, [flat.size]])
    return [int(length) for length in np.diff(ends)]


def _voc_xml(file_name: str, size: int, objects: list[SceneObject]) -> str:
    """A VOC annotation; the corners of boxes are 1-based and inclusive."""
    lines = [
        "<annotation>",
        f"  <filename>{escape(file_name)}</filename>",
        f"  <size><width>{size}</width><height>{size}</height><depth>3</depth></size>",
    ]
    for obj in objects:
        x0, y0, x1, y1 = obj.box
        lines += [
            "  <object>",
            f"    <name>{CLASSES[obj.category]}</name>",
            "    <truncated>0</truncated><difficult>0</difficult>",
            f"    <bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _coco(scenes: list[Record], size: int) -> Record:
    images: list[Record] = []
    annotations: list[Record] = []
    for image_id, scene in enumerate(scenes, start=1):
        images.append(
            {"id": image_id, "file_name": f"{scene['name']}.jpg", "width": size, "height": size}
        )
        for instance in scene["instances"]:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **instance})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}

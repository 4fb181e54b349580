"""Reader of images with label files: ``semseg:IMAGES:LABELS``, and VOC 2012's segmentation.

Detectron2 registers Cityscapes' semantic labels but not VOC's.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moco_common.errors import UserError
from moco_common.files import read_text
from moco_common.text import counted
from moco_det.data.datasets.findings import DatasetReport
from moco_det.data.datasets.image_files import is_image
from moco_det.data.datasets.image_frame import read_headers
from moco_det.data.datasets.label_files import read_labels

IGNORE_LABEL = 255
CLASS_FILE = "classes.txt"
# The train_aug split (10,582 images) is VOC's train set with the annotations of Hariharan et
# al. 2011, "Semantic Contours from Inverse Detectors".
VOC_SPLITS = {
    "voc_2012_sem_seg_train_aug": ("train_aug", "trainaug"),
    "voc_2012_sem_seg_val": ("val",),
}
VOC_LABELS = ("SegmentationClassAug", "SegmentationClass")
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()
Pairs = list[tuple[Path, Path]]


def is_semantic(spec: str) -> bool:
    """Return True if :func:`read_semantic` reads the data set of this name."""
    return spec.startswith("semseg:") or spec in VOC_SPLITS


def read_semantic(spec: str, report: DatasetReport) -> tuple[list[dict[str, Any]], list[str]]:
    """Read images with label files.

    Args:
        spec: ``semseg:IMAGES:LABELS``, two folders whose files pair up by name. Labels are grey or
            palette PNGs with the class of each pixel, 255 where it is not counted;
            ``LABELS/classes.txt`` may hold the names of the classes, one a line. Or
            ``voc_2012_sem_seg_train_aug`` or ``voc_2012_sem_seg_val``: ``VOC2012`` below
            ``DETECTRON2_DATASETS``, with ``SegmentationClassAug``.

    Returns:
        Records with ``file_name``, ``sem_seg_file_name``, ``image_id``, ``width`` and ``height``;
        and the names of the classes.

    Raises:
        UserError: a folder or a split is missing, or a label has no class name.
    """
    if spec in VOC_SPLITS:
        return _records(_voc_pairs(spec), report), list(VOC_CLASSES)
    pairs = _folder_pairs(spec, report)
    classes = _class_names(pairs, spec, report)
    return _records(pairs, report), classes


def _voc_pairs(spec: str) -> Pairs:
    root = Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")), "VOC2012")
    lists = [root / "ImageSets/Segmentation" / f"{split}.txt" for split in VOC_SPLITS[spec]]
    split = next(filter(Path.is_file, lists), None)
    labels = next(filter(Path.is_dir, (root / folder for folder in VOC_LABELS)), None)
    if split is None or labels is None:
        missing = lists[0] if split is None else root / VOC_LABELS[0]
        raise UserError(
            f"{spec} is not on this machine ({missing} is missing): set DETECTRON2_DATASETS to the "
            "folder that holds VOC2012, or give your own data as semseg:IMAGES:LABELS."
        )
    names = read_text(split).split()
    return [(root / "JPEGImages" / f"{name}.jpg", labels / f"{name}.png") for name in names]


def _folder_pairs(spec: str, report: DatasetReport) -> Pairs:
    """Pairs of images and labels with the same name; the report lists those without a partner."""
    first, _, second = spec.removeprefix("semseg:").rpartition(":")
    images, labels = Path(first).expanduser(), Path(second).expanduser()
    for folder in (images, labels):
        if not first or not folder.is_dir():
            raise UserError(f"'{spec}': there is no folder {folder}; write semseg:IMAGES:LABELS.")
    by_stem = {p.stem: p for p in sorted(images.iterdir()) if is_image(p)}
    labelled = {p.stem: p for p in sorted(labels.iterdir()) if p.suffix.lower() == ".png"}
    for stem in sorted(by_stem.keys() - labelled.keys()):
        report.add("labels missing", by_stem[stem].name, action="image skipped")
    for stem in sorted(labelled.keys() - by_stem.keys()):
        report.add("image missing", labelled[stem].name, action="labels skipped")
    return [(by_stem[stem], labelled[stem]) for stem in by_stem if stem in labelled]


def _class_names(pairs: Pairs, spec: str, report: DatasetReport) -> list[str]:
    """Class names from ``classes.txt``, or one for each number up to the largest label.

    Pairs with unreadable labels are removed from ``pairs``, in place.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        largest = list(pool.map(_largest_label, [labels for _, labels in pairs]))
    usable = []
    for pair, found in zip(pairs, largest, strict=True):
        if isinstance(found, str):
            report.add(found, pair[1].name, action="image skipped")
        else:
            usable.append((pair, found))
    pairs[:] = [pair for pair, _ in usable]
    count = max((found for _, found in usable), default=-1) + 1
    path = Path(spec.rpartition(":")[2]).expanduser() / CLASS_FILE
    if not path.is_file():
        return [f"class {number}" for number in range(count)]
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if len(names) < count:
        raise UserError(
            f"{path} names {counted(len(names), 'class')}, but the labels go up to {count - 1}."
        )
    return names


def _largest_label(path: Path) -> int | str:
    try:
        labels = np.unique(read_labels(path))
    except UserError:
        return "labels unreadable"
    return int(max(labels[labels != IGNORE_LABEL], default=-1))


def _records(pairs: Pairs, report: DatasetReport) -> list[dict[str, Any]]:
    headers = read_headers([image for image, _ in pairs])
    label_headers = read_headers([labels for _, labels in pairs])
    records = []
    for (image, labels), header, label_header in zip(pairs, headers, label_headers, strict=True):
        if isinstance(header, str):
            report.add(header, image.name, action="image skipped")
        elif isinstance(label_header, str):
            kind = label_header.replace("image", "labels", 1)
            report.add(kind, labels.name, action="image skipped")
        elif header.shown != label_header.stored:
            report.add("labels of another size", labels.name, action="image skipped")
        else:
            records.append(
                {
                    "file_name": str(image.absolute()),
                    "sem_seg_file_name": str(labels.absolute()),
                    "image_id": image.stem,
                    "width": header.shown[0],
                    "height": header.shown[1],
                }
            )
    return records

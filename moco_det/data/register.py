"""Own data sets by a short text, checked as they are read.

``voc:DIR:SPLIT`` is a folder in PASCAL VOC layout, ``coco:JSON:IMAGES`` an annotation file in COCO
format with its image folder; any other text is a name that Detectron2 knows already. The number
and the names of the classes are read from the data.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_common.errors import UserError
from moco_common.files import write_json_atomically
from moco_common.text import counted
from moco_det.data.datasets.coco import read_coco
from moco_det.data.datasets.findings import DatasetReport, collector_paused
from moco_det.data.datasets.voc import read_voc

__all__ = ["DatasetReport", "dataset_report", "register", "write_findings"]
FORMS = "voc:DIR:SPLIT, coco:JSON:IMAGES or a name that Detectron2 knows"


def register(spec: str, classes: Sequence[str] | None = None, *, strict: bool = False) -> str:
    """Read and check a data set, and register it with Detectron2.

    The data are read at each call, so what is registered is what is on the disk. Catalogs belong
    to a process: call it in every process that loads data.

    Args:
        spec: ``voc:DIR:SPLIT`` (the split ``all`` needs no ``ImageSets``), ``coco:JSON:IMAGES``,
            or one of Detectron2's own names, which passes through unchanged.
        classes: class names in the order of the training set, for a test set. By default the data
            set's own: of a VOC folder all classes of the folder, sorted, so that its splits
            agree; of a COCO file its categories by id.
        strict: whether anything wrong in the data is an error instead of an entry in the report.

    Returns:
        The name in ``DatasetCatalog`` and ``MetadataCatalog``, safe in file names. Annotations
        hold ``bbox``, ``bbox_mode`` (XYXY_ABS), ``category_id`` (contiguous), ``iscrowd`` and, by
        format, ``difficult`` or ``area``, ``segmentation`` and ``keypoints``. Metadata:
        ``thing_classes``, ``evaluator_type`` ("voc" | "coco"), ``has_masks``, ``mask_format``
        ("polygon" | "bitmask"), ``spec`` and, for COCO, ``thing_dataset_id_to_contiguous_id``
        and the ``keypoint_*`` that Detectron2 looks up, where the data have keypoints.

    Raises:
        UserError: if the data set cannot be read, has no usable image, or has a class that
            ``classes`` lacks.
    """
    kind, _, rest = spec.partition(":")
    if kind not in ("voc", "coco") or not rest:
        return _known_to_detectron2(spec, classes)
    report = DatasetReport(spec)
    with collector_paused():
        records, found, metadata, title = _read(kind, spec, rest, report)
    if not records:
        raise UserError(f"{spec} has no usable image{_commonest(report)}")

    thing_classes = list(found if classes is None else classes)
    if not thing_classes:
        raise UserError(f"{spec} names no class: it has no object with a class name")
    _number_classes(spec, records, thing_classes)
    if kind == "coco":
        ids = metadata.pop("category_ids")
        metadata["thing_dataset_id_to_contiguous_id"] = _contiguous_ids(ids, thing_classes)

    report.classes = thing_classes
    report.images = len(records)
    report.objects = sum(len(record["annotations"]) for record in records)
    report.images_without_objects = sum(not record["annotations"] for record in records)
    if strict and report.findings:
        raise UserError(f"{counted(len(report.findings), 'fault')} in {report.summary()}")

    name = _catalog_name(kind, title, f"{spec}\0{Path.cwd()}\0{classes and list(classes)}")
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    # Callers change the dicts they get, so each call must return fresh ones; unpickling our own
    # bytes is several times faster than a deep copy.
    packed = pickle.dumps(records, protocol=pickle.HIGHEST_PROTOCOL)
    DatasetCatalog.register(name, lambda: pickle.loads(packed))
    MetadataCatalog.get(name).set(thing_classes=thing_classes, report=report, **metadata)
    return name


def _read(
    kind: str, spec: str, rest: str, report: DatasetReport
) -> tuple[list[dict[str, Any]], list[str], dict[str, Any], str]:
    """Records with class names, the class names, metadata and a title."""
    metadata: dict[str, Any] = {"evaluator_type": kind, "spec": spec}
    if kind == "voc":
        folder, split = _two_parts(spec, *rest.rpartition(":")[::2])
        records, found = read_voc(Path(folder).expanduser(), split, report)
        metadata |= {"has_masks": False, "mask_format": "polygon", "split": split}
        return records, found, metadata, f"{Path(folder).absolute().name}_{split}"
    json_file, images = _two_parts(spec, *_split_at_json(rest))
    records, found, more = read_coco(
        Path(json_file).expanduser(), Path(images).expanduser(), report
    )
    return records, found, metadata | more, Path(json_file).stem


def dataset_report(name: str) -> DatasetReport | None:
    """The report of a data set registered by :func:`register`; None for Detectron2's own."""
    return MetadataCatalog.get(name).get("report") if name in MetadataCatalog else None


def write_findings(names: Iterable[str], path: str | os.PathLike[str]) -> int:
    """Write everything wrong in some registered data sets into one JSON file, atomically.

    Args:
        names: what :func:`register` returned; Detectron2's own data sets are left out.

    Returns:
        The number of findings. Each holds ``kind``, ``file``, ``object`` and ``action``.
    """
    reports = [report for name in names if (report := dataset_report(name)) is not None]
    content = {
        "format": "moco-det/findings/1",
        "datasets": [report.as_dict() for report in reports],
    }
    write_json_atomically(path, content)
    return sum(len(report.findings) for report in reports)


def _two_parts(spec: str, first: str, second: str) -> tuple[str, str]:
    if not first or not second:
        raise UserError(f"'{spec}' is not a data set: write {FORMS}")
    return first, second


def _split_at_json(rest: str) -> tuple[str, str]:
    """Split JSON:IMAGES behind ``.json``, so that either path may hold a colon."""
    at = rest.find(".json:")
    if at >= 0:
        return rest[: at + 5], rest[at + 6 :]
    first, _, second = rest.rpartition(":")
    return first, second


def _known_to_detectron2(name: str, classes: Sequence[str] | None) -> str:
    if name not in DatasetCatalog:
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UserError(f"'{name}' is not a data set{hint}: write {FORMS}")
    own = MetadataCatalog.get(name).get("thing_classes")
    if classes is not None and own is not None and list(own) != list(classes):
        raise UserError(
            f"the classes of {name} are not those of the training set "
            f"({len(own)} and {len(classes)}): test on data with the same classes"
        )
    return name


def _commonest(report: DatasetReport) -> str:
    groups = report.groups()
    if not groups:
        return ": its list of images is empty"
    (kind, _), found = max(groups.items(), key=lambda item: len(item[1]))
    return f": {len(found):,} x {kind} (first: {found[0].file} {found[0].object})".rstrip()


def _number_classes(spec: str, records: list[dict[str, Any]], classes: list[str]) -> None:
    """Replace class names by their index, in place."""
    index = {name: number for number, name in enumerate(classes)}
    for record in records:
        for annotation in record["annotations"]:
            name = annotation["category_id"]
            if name not in index:
                raise UserError(
                    f"{spec} has the class '{name}' ({record['image_id']}), which the training "
                    f"set lacks: its classes are {', '.join(classes[:20])}"
                )
            annotation["category_id"] = index[name]


def _contiguous_ids(ids: dict[str, int], classes: list[str]) -> dict[int, int]:
    """Category id -> class index, one to one; classes that the file lacks get unused ids."""
    unused = max(ids.values(), default=0) + 1
    mapping = {}
    for number, name in enumerate(classes):
        if name in ids:
            mapping[ids[name]] = number
        else:
            mapping[unused] = number
            unused += 1
    return mapping


def _catalog_name(kind: str, title: str, identity: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9-]+", "_", title).strip("_")[:40] or "data"
    return f"{kind}_{slug}_{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

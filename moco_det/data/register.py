"""Own data sets by spec, checked as they are read.

``voc:DIR:SPLIT`` is a folder of PASCAL VOC annotations, ``coco:DIR:SPLIT`` one of COCO's and
``yolo:DIR:SPLIT`` one of YOLO's, in the layouts that tools write; without SPLIT, all annotated
images. ``coco:JSON:IMAGES`` is an annotation file with its image folder, which is found by itself
if it is left out; ``semseg:IMAGES:LABELS`` is images with label files. A share, as in
``voc:DIR:90%`` and ``voc:DIR:90%-rest``, makes two splits where there is none. Any other text is
the name of a data set that Detectron2 knows. The classes are read from the data.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_common.errors import UserError
from moco_common.files import write_json_atomically
from moco_common.text import counted
from moco_det.data.catalog import Record, add_to_catalogs, dataset_report
from moco_det.data.datasets.coco import read_coco
from moco_det.data.datasets.coco_layouts import find_coco, image_places
from moco_det.data.datasets.coco_masks import settle_masks
from moco_det.data.datasets.findings import (
    CONSEQUENCES,
    DatasetReport,
    SemanticReport,
    collector_paused,
)
from moco_det.data.datasets.sem_seg import IGNORE_LABEL, is_semantic, read_semantic
from moco_det.data.datasets.voc import VOCFolder
from moco_det.data.datasets.yolo import read_yolo
from moco_det.data.shares import Share, split_share

__all__ = ["DatasetReport", "OwnData", "dataset_report", "read", "register", "write_findings"]
FORMS = (
    "voc:DIR:SPLIT, coco:DIR:SPLIT, yolo:DIR:SPLIT, coco:JSON:IMAGES, semseg:IMAGES:LABELS or a "
    "name that Detectron2 knows"
)


def register(
    spec: str, classes: Sequence[str] | None = None, *, strict: bool = False, masks: bool = True
) -> str:
    """Read and check a data set, and register it with Detectron2 under its spec.

    Each call reads the data anew. Catalogs belong to a process.

    Args:
        spec: one of the forms above (the split ``all`` is every annotated image), or one of
            Detectron2's own names.
        classes: class names in the order of the training set, for a test set. By default the data
            set's own: for a VOC folder all classes of the folder, sorted, so that its splits
            agree; for a COCO file its categories by id.
        strict: whether a finding is an error instead of an entry in the report.
        masks: whether masks are wanted. Without, they are not judged, and no object is left out
            for its mask.

    Returns:
        The name in ``DatasetCatalog`` and ``MetadataCatalog``, which is the spec. Annotations hold
        ``bbox``, ``bbox_mode`` (XYXY_ABS), ``category_id`` (contiguous), ``iscrowd`` and, by
        format, ``difficult`` or ``area``, ``segmentation`` and ``keypoints``. Metadata:
        ``thing_classes``, ``evaluator_type`` ("voc" | "coco"), ``has_masks``, ``mask_format``
        ("polygon" | "bitmask"), ``report`` and, for COCO, ``thing_dataset_id_to_contiguous_id``
        and Detectron2's ``keypoint_*``, where the data have keypoints. Records with pixel labels
        hold ``sem_seg_file_name``; their metadata ``stuff_classes``, ``ignore_label``,
        ``evaluator_type`` "sem_seg" and ``report``.

    Raises:
        UserError: the data set cannot be read, has no usable image, or has a class that
            ``classes`` lacks.
    """
    data = read(spec)
    if data is None:
        check_known(spec, classes)
    else:
        data.register(classes, strict=strict, masks=masks)
    return spec


@dataclass
class OwnData:
    """A data set as it was read, before its classes are numbered.

    Attributes:
        records: one for each usable image, with class names under ``category_id``.
        classes: the data set's own class names.
        metadata: what else Detectron2's catalog keeps.
    """

    spec: str
    records: list[Record]
    classes: list[str]
    metadata: dict[str, Any]
    report: DatasetReport

    def register(
        self, classes: Sequence[str] | None = None, *, strict: bool = False, masks: bool = True
    ) -> None:
        """Number the classes and register the data set, once; see :func:`register`."""
        report = self.report
        report.classes = list(self.classes if classes is None else classes)
        report.images = len(self.records)
        if not report.classes:
            raise UserError(f"{self.spec} names no class: it has no object with a class name")
        self._note_names_in_two_cases(report.classes)
        if is_semantic(self.spec):
            self._check_labels(report.classes)
            self.metadata["stuff_classes"] = report.classes
        else:
            self.metadata |= settle_masks(self.records, report, wanted=masks)
            self._number_classes(report.classes)
            self.metadata["thing_classes"] = report.classes
            counts = [len(record["annotations"]) for record in self.records]
            report.objects, report.images_without_objects = sum(counts), counts.count(0)
        if strict and report.findings:
            raise UserError(f"{counted(len(report.findings), 'fault')} in {report.summary()}")
        add_to_catalogs(self.spec, self.records, {**self.metadata, "report": report})

    def _note_names_in_two_cases(self, classes: list[str]) -> None:
        by_name: dict[str, list[str]] = {}
        for name in classes:
            by_name.setdefault(name.casefold(), []).append(name)
        for names in by_name.values():
            if len(names) > 1:
                self.report.notes.append(
                    f"the classes {' and '.join(names)} differ in case alone: they stay two classes"
                )

    def _check_labels(self, classes: list[str]) -> None:
        allowed = min(len(classes), IGNORE_LABEL)
        if len(self.classes) > allowed:
            found = counted(len(self.classes), "class")
            raise UserError(f"{self.spec} has {found}, but there can be only {allowed}.")

    def _number_classes(self, classes: list[str]) -> None:
        """Replace class names by their indices, in place."""
        index = {name: number for number, name in enumerate(classes)}
        for record in self.records:
            for annotation in record["annotations"]:
                name = annotation["category_id"]
                if name not in index:
                    raise UserError(
                        f"{self.spec} has the class '{name}' ({record['image_id']}), which the "
                        f"training set lacks: its classes are {', '.join(classes[:20])}"
                    )
                annotation["category_id"] = index[name]
        if "category_ids" in self.metadata:
            ids = contiguous_ids(self.metadata.pop("category_ids"), classes)
            self.metadata["thing_dataset_id_to_contiguous_id"] = ids


def read(spec: str, voc_folder: Callable[[Path], VOCFolder] = VOCFolder) -> OwnData | None:
    """Read a data set; None for a name that is not a spec.

    Args:
        voc_folder: reads a VOC folder; a cached one reads it once for several splits.

    Raises:
        UserError: the data set cannot be read, or has no usable image or no class.
    """
    if not is_spec(spec):
        return None
    report = SemanticReport(spec) if is_semantic(spec) else DatasetReport(spec)
    with collector_paused():
        if is_semantic(spec):
            records, classes = read_semantic(spec, report)
            metadata = {"evaluator_type": "sem_seg", "ignore_label": IGNORE_LABEL}
        else:
            whole, share = split_share(spec)
            records, classes, metadata = _read_objects(whole, spec, share, voc_folder, report)
            if share is not None and records:
                records = share.of(records)
    if not records:
        raise UserError(f"{spec} has no usable image{_commonest(report)}")
    return OwnData(spec, records, classes, metadata, report)


def _read_objects(
    whole: str,
    spec: str,
    share: Share | None,
    voc_folder: Callable[[Path], VOCFolder],
    report: DatasetReport,
) -> tuple[list[Record], list[str], dict[str, Any]]:
    """Records, classes and metadata of a data set of boxes, before its share is taken."""
    kind, _, rest = whole.partition(":")
    if kind == "coco" and ".json:" in rest:
        first, second = _split_at_json(rest)
    elif os.path.exists(os.path.expanduser(rest)):
        first, second = rest, "all"
    else:
        first, _, second = rest.rpartition(":")
    _check_parts(spec, first, second)
    folder = Path(first).expanduser()
    if kind == "voc":
        records, classes = voc_folder(folder).read(second, report)
        return records, classes, {"evaluator_type": "voc"}
    if kind == "yolo":
        records, classes, metadata = read_yolo(folder, second, report)
        return records, classes, {**metadata, "evaluator_type": "coco"}
    if folder.is_dir():
        file, places = find_coco(folder, second)
    elif second == "all":
        file, places = folder, image_places(folder)
    else:
        file, places = folder, [Path(second).expanduser()]
    records, classes, metadata = read_coco(file, places, report)
    return records, classes, {**metadata, "evaluator_type": "coco", "annotation_file": str(file)}


def is_spec(text: str) -> bool:
    """True if :func:`read` reads the data set of this name, not Detectron2."""
    kind, _, rest = text.partition(":")
    return is_semantic(text) or (kind in ("voc", "coco", "yolo") and bool(rest))


def check_known(name: str, classes: Sequence[str] | None) -> None:
    """Check that Detectron2 knows a data set, with these classes.

    Raises:
        UserError: it does not, or the data set has other classes.
    """
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


def write_findings(names: Iterable[str], path: str | os.PathLike[str]) -> int:
    """Write all findings of some registered data sets into one JSON file, atomically.

    Args:
        names: in the catalogs; Detectron2's own data sets are left out.

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


def contiguous_ids(ids: dict[str, int], classes: list[str]) -> dict[int, int]:
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


def _check_parts(spec: str, first: str, second: str) -> None:
    if not first and second:
        raise UserError(f"'{spec}': there is no file or folder {second}: write {FORMS}")
    if not first or not second:
        raise UserError(f"'{spec}' is not a data set: write {FORMS}")


def _split_at_json(rest: str) -> tuple[str, str]:
    """Split JSON:IMAGES after ``.json``, so that either path may hold a colon."""
    at = rest.find(".json:")
    if at >= 0:
        return rest[: at + 5], rest[at + 6 :]
    first, _, second = rest.rpartition(":")
    return first, second


def _commonest(report: DatasetReport) -> str:
    groups = report.groups()
    if not groups:
        return ": its list of images is empty"
    causes = {key: found for key, found in groups.items() if key[0] not in CONSEQUENCES}
    (kind, _), found = max((causes or groups).items(), key=lambda item: len(item[1]))
    where = f"{found[0].file}, {found[0].object}" if found[0].object else found[0].file
    return f": {len(found):,} x {kind} (first: {where})"

"""The survey of data sets from the command line: read, check, count, draw and convert."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_common.errors import UserError
from moco_common.files import protecting, same_content
from moco_common.progress import silent
from moco_common.text import counted
from moco_det.data.build import check_builtin
from moco_det.data.catalog import dataset_report
from moco_det.data.check_images import find_unreadable
from moco_det.data.datasets.sem_seg import is_semantic
from moco_det.data.register import register
from moco_det.data.shares import Share, parse_percent
from moco_det.survey.coco_file import convert_to_coco
from moco_det.survey.contact_sheet import draw_sheet
from moco_det.survey.counts import as_text, count_objects, count_pixels


@dataclass(frozen=True)
class Options:
    """The parts of a survey beside reading and counting.

    Attributes:
        specs: data sets.
        strict: exit with 1 if there is a finding.
        check_images: decode all images.
        masks: judge masks; without, boxes only.
        as_json: print JSON instead of tables.
        sheet, images: file of the contact sheet, and the number of images on it.
        to_coco: COCO file to write.
        split: share of the training images, such as ``80%``.
        quiet: print findings only.
    """

    specs: Sequence[str]
    strict: bool = False
    check_images: bool = False
    masks: bool = True
    as_json: bool = False
    sheet: Path | None = None
    images: int = 16
    to_coco: Path | None = None
    split: str | None = None
    quiet: bool = False


def survey(options: Options) -> int:
    """Report on data sets; return the exit status.

    Raises:
        UserError: a data set cannot be read, or an output would replace a file of the user.
    """
    share = None if options.split is None else Share(parse_percent(options.split), rest=False)
    surveys = [_survey_one(spec, options) for spec in options.specs]
    copies = find_copies(options.specs)
    if options.as_json:
        print(json.dumps({"datasets": surveys, "copies": copies}, indent=1))
    else:
        for line in _copies_as_text(copies):
            print(line)
    if options.sheet or options.to_coco:
        _write(options, share)
    faults = sum(len(one["unreadable"]) for one in surveys)
    if options.strict:
        faults += sum(len(one["findings"]) for one in surveys)
    if faults:
        print(f"error: {counted(faults, 'fault')} in the data", file=sys.stderr)
    return 1 if faults else 0


def _survey_one(spec: str, options: Options) -> dict[str, Any]:
    """Read and count one data set; print the result unless JSON is wanted."""
    register(spec, masks=options.masks)
    report = dataset_report(spec)
    if report is None:
        check_builtin(spec)
    records, metadata = DatasetCatalog.get(spec), MetadataCatalog.get(spec)
    semantic = is_semantic(spec) or bool(records and "annotations" not in records[0])
    classes = list(metadata.get("stuff_classes" if semantic else "thing_classes"))
    broken = {}
    if options.check_images:
        broken = find_unreadable([spec], whole=True, say=silent if options.quiet else _say)
    readable = [record for record in records if record["file_name"] not in broken]
    if semantic:
        counts = count_pixels(readable, classes, metadata.get("ignore_label", 255))
    else:
        counts = count_objects(readable, classes)
    if not options.as_json:
        summary = report.summary() if report else f"{spec}: {counted(len(records), 'image', ',')}"
        for line in summary.splitlines()[options.quiet :]:  # the first holds the counts
            print(line)
        for path, reason in broken.items():
            print(f"  cannot be decoded: {path} ({reason})")
        if not options.quiet:
            print(f"\n{as_text(counts)}\n")
    found = report.as_dict() if report else {"findings": [], "notes": [], "counts": []}
    return {
        "spec": spec,
        **counts,
        "unreadable": broken,
        "findings": found["findings"],
        "findings_by_kind": found["counts"],
        "notes": found["notes"],
    }


def find_copies(specs: Sequence[str]) -> list[dict[str, Any]]:
    """Image files of some registered data sets with the same content.

    Returns:
        Groups of ``files``, and the ``specs`` whose images they are.
    """
    owners: dict[str, list[str]] = {}
    for spec in dict.fromkeys(specs):
        for path in {record["file_name"] for record in DatasetCatalog.get(spec)}:
            owners.setdefault(path, []).append(spec)
    groups = same_content(owners)
    grouped = {path for group in groups for path in group}
    groups += [[path] for path, found in owners.items() if len(found) > 1 and path not in grouped]
    return [
        {
            "files": sorted(group),
            "specs": list(dict.fromkeys(spec for path in group for spec in owners[path])),
        }
        for group in groups
    ]


def _copies_as_text(copies: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for several in (True, False):
        groups = [group for group in copies if (len(group["specs"]) > 1) == several]
        if groups:
            first = " = ".join(groups[0]["files"][:2])
            what = counted(len(groups), "image", ",")
            where = "several of these data sets: what is tested was trained on"
            lines.append(
                f"warning: {what} in {where} (first: {first})"
                if several
                else f"note: {what} more than once, in files of the same content (first: {first})"
            )
    return lines


def _write(options: Options, share: Share | None) -> None:
    """Draw and convert the one data set.

    Raises:
        UserError: a file would be replaced that this tool did not write.
    """
    (spec,) = options.specs
    records, metadata = DatasetCatalog.get(spec), MetadataCatalog.get(spec)
    inputs = [metadata.get("annotation_file") or metadata.get("json_file")]
    with protecting([*filter(None, inputs), *(record["file_name"] for record in records)]):
        if options.sheet is not None:
            classes = metadata.get("thing_classes") or metadata.get("stuff_classes")
            _check_place(options.sheet, spec, records)
            drawn = draw_sheet(records, classes, options.sheet, options.images)
            _say(f"{options.sheet}: {counted(drawn, 'image')} with what is annotated")
        if options.to_coco is not None:
            for path, count in convert_to_coco(spec, options.to_coco, share).items():
                _say(f"{path}: {counted(count, 'image', ',')}; read it as coco:{path}")


def _check_place(sheet: Path, spec: str, records: Sequence[dict[str, Any]]) -> None:
    """Refuse a sheet that a later run would take for one of the images, or ."""
    folders = {Path(part).expanduser() for part in spec.split(":")[1:]}
    folders |= {Path(record["file_name"]).parent for record in records}
    inside = {folder.resolve() for folder in folders if folder.is_dir()}
    here = sheet.expanduser().resolve()
    if not inside.isdisjoint(here.parents):
        raise UserError(
            f"{sheet} would lie among the images of {spec} and be taken for one of them: choose "
            "another folder with --sheet"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr)

"""A first look at photographs to pre-train on: how many, how large, which cannot be read."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moco_common.errors import UserError
from moco_common.files import same_content
from moco_common.hardware import cpu_count
from moco_common.images import DecodeError, open_picture, save_contact_sheet
from moco_common.progress import follow
from moco_common.text import counted
from pretrain.data.decoding import decode
from pretrain.data.source_base import Source
from pretrain.data.sources import open_source
from pretrain.visualization import contact_sheet

COLUMNS, SIDE = 4, 240  # of the contact sheet: cells in a row, pixels of a cell
ANNOTATIONS = (".xml", ".json", ".yaml", ".yml")


def survey_photographs(
    specs: Sequence[str],
    *,
    check_images: bool = False,
    as_json: bool = False,
    sheet: Path | None = None,
    images: int = 16,
    quiet: bool = False,
) -> int:
    """Report on photographs; return the exit status, 1 if some cannot be read.

    Args:
        specs: sources, as for pre-training.
        check_images: decode all images instead of reading their headers.
        as_json: print JSON instead of text.
        sheet: contact sheet to draw, PNG or JPEG by its suffix.
        images: number of images on it.
        quiet: print what cannot be read only.

    Raises:
        UserError: a source cannot be opened, or the sheet would lie among the images.
    """
    source = open_source(list(specs))
    found = count_photographs(source, decode_all=check_images, quiet=quiet)
    if as_json:
        print(json.dumps({"specs": list(specs), **found}, indent=1))
    elif not quiet or found["unreadable"]:
        print(as_text(specs, found))
    if sheet is not None:
        _draw(source, sheet, images)
        print(f"{sheet}: {counted(min(images, len(source)), 'image')}", file=sys.stderr)
    return 1 if found["unreadable"] else 0


def count_photographs(
    source: Source, *, decode_all: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Count the images of a source.

    Returns:
        ``images``, ``formats`` (name -> images), ``sizes`` (``smallest``, ``median`` and
        ``largest``, as (w, h), by area), ``class_folders`` (name -> images), ``unreadable`` (name
        -> reason), ``copies`` (groups of files with the same content) and ``notes``.
    """

    def look(index: int) -> tuple[str, tuple[int, int], str]:
        try:
            data = source.read(index)
            with open_picture(data) as image:
                kind, size = str(image.format), image.size
            if decode_all:
                decode(data)
        except (OSError, DecodeError) as error:
            return "", (0, 0), " ".join(str(error).split()) or type(error).__name__
        return kind, size, ""

    with ThreadPoolExecutor(cpu_count()) as pool:
        looked = pool.map(look, range(len(source)))
        seen = list(follow(looked, len(source), "reading", quiet))
    sizes = sorted((size for _, size, reason in seen if not reason), key=lambda s: s[0] * s[1])
    names = [source.name(index) for index in range(len(source))]
    classes: dict[str, int] = {}
    if source.labels is not None:
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        classes = dict(zip(source.classes, counts.tolist(), strict=True))
    return {
        "images": len(source),
        "formats": dict(Counter(kind for kind, _, reason in seen if not reason).most_common()),
        "sizes": {
            "smallest": sizes[0],
            "median": sizes[len(sizes) // 2],
            "largest": sizes[-1],
        }
        if sizes
        else {},
        "class_folders": classes,
        "unreadable": {
            name: reason for name, (_, _, reason) in zip(names, seen, strict=True) if reason
        },
        "copies": [] if source.streamed else same_content(names),
        "notes": list(source.notes),
    }


def as_text(specs: Sequence[str], found: dict[str, Any]) -> str:
    """The counts as a few lines."""
    formats = ", ".join(f"{count:,} {name}" for name, count in found["formats"].items())
    lines = [f"{' '.join(specs)}: {counted(found['images'], 'image', ',')} ({formats})"]
    if found["sizes"]:
        smallest, median, largest = (f"{w}x{h}" for w, h in found["sizes"].values())
        lines.append(f"  sizes       {smallest} to {largest}, median {median}")
    if found["class_folders"]:
        per = sorted(found["class_folders"].values())
        folders = counted(len(per), "class folder", ",")
        lines.append(f"  folders     {folders} of {per[0]:,} to {per[-1]:,} images, for probes")
    broken, copies = found["unreadable"], found["copies"]
    if broken:
        name, reason = next(iter(broken.items()))
        lines.append(
            f"  unreadable  {counted(len(broken), 'image', ',')} (first: {name}: {reason})"
        )
    if copies:
        extra = sum(len(group) - 1 for group in copies)
        first = " = ".join(copies[0][:2])
        lines.append(f"  copies      {extra:,} repeat the content of another (first: {first})")
    lines += [f"  note: {note}" for note in found["notes"]]
    if any(ending in note for note in found["notes"] for ending in ANNOTATIONS):
        lines.append("  note: to read annotations, write voc:DIR, coco:DIR or yolo:DIR")
    return "\n".join(lines)


def _draw(source: Source, path: Path, count: int) -> None:
    """Write evenly spaced images of a source as a contact sheet.

    Raises:
        UserError: the sheet would lie among the images, or replace another file, or no image can
            be read.
    """
    if source.files_in(path.absolute().parent):
        raise UserError(
            f"{path} would lie among the images and be taken for one of them: choose another "
            "folder with --sheet"
        )
    cells = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int):
        try:
            cells.append(contact_sheet.fitted(decode(source.read(int(index))), SIDE))
        except (OSError, DecodeError):
            continue
    if not cells:
        raise UserError("no contact sheet: none of the images can be read")
    rows = [cells[at : at + COLUMNS] for at in range(0, len(cells), COLUMNS)]
    save_contact_sheet(contact_sheet.sheet(rows), path)

"""COCO files in a folder: which file and which images a split has, in the layouts that tools write.

``train/_annotations.coco.json`` beside its images (Roboflow), ``annotations/instances_train.json``
with ``train`` or ``images/train`` (COCO, CVAT), ``train.json`` with ``images``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from moco_common.errors import UserError
from moco_det.data.datasets.image_files import files_below

IMAGE_FOLDERS = ("images", "JPEGImages")


def find_coco(folder: Path, split: str) -> tuple[Path, list[Path]]:
    """The annotation file of a split, and the folders that may hold its images.

    ``all`` is the only annotation file.

    Raises:
        UserError: no file, or several, can be the split's.
    """
    files = [below for below, _ in files_below(folder) if below.lower().endswith(".json")]
    files = [below for below in files if below.count("/") <= 3]
    found = [below for below in files if split == "all" or _names_split(below, split)]
    instances = [below for below in found if "instances" in os.path.basename(below)]
    if len(found) > 1 and len(instances) == 1:
        found = instances
    if len(found) != 1:
        problem = f"has no annotation file of the split '{split}'"
        if found:
            problem = f"has {len(found)} annotation files that can be the split '{split}'"
        there = ", ".join((found or files)[:8]) or "none"
        raise UserError(
            f"{folder} {problem} (JSON files there: {there}): name the file and its images as "
            "coco:JSON:IMAGES"
        )
    file = folder / found[0]
    names = [child.name for child in sorted(folder.iterdir()) if child.is_dir()]
    like = [name for name in names if _names_split(name, split)]
    places = [file.parent, *(folder / name for name in like)]
    for images in IMAGE_FOLDERS:
        places += [folder / images / split, folder / split / images, folder / images]
    return file, [*places, folder]


def image_places(file: Path) -> list[Path]:
    """The folders that may hold the images of an annotation file: its own and those beside it."""
    names = [file.stem, *re.split(r"[_\-. ]+", file.stem)]
    places = []
    for folder in (file.parent, file.parent.absolute().parent):
        for base in (folder, *(folder / images for images in IMAGE_FOLDERS)):
            places += [base, *(base / name for name in names)]
    return places


def _names_split(path: str, split: str) -> bool:
    """True if a folder or a part of the file's name is the split, also as in ``train2017``."""
    words = re.split(r"[/_\-. ]+", os.path.splitext(path)[0].lower())
    return any(re.fullmatch(rf"{re.escape(split.lower())}\d*", word) for word in words)

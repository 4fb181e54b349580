"""Decoding of a data set's images before a run, so that none ends it hours later."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from detectron2.data import DatasetCatalog

from moco_common.errors import UserError
from moco_common.files import open_regular
from moco_common.hardware import cpu_count
from moco_common.images import DecodeError, read_picture
from moco_common.progress import Loop
from moco_common.text import counted
from moco_det.data.catalog import dataset_report

# What an intact file ends with, by what it begins with: JPEG and PNG.
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}
_TAIL = 64  # bytes; some cameras and tools append a few


def check_images(names: Iterable[str], *, whole: bool, say: Callable[[str], None]) -> None:
    """Check that all images of some registered data sets can be decoded.

    Args:
        names, whole, say: see `find_unreadable`.

    Raises:
        UserError: images cannot be decoded; all of them are named.
    """
    broken = find_unreadable(names, whole=whole, say=say)
    if broken:
        found = ", ".join(f"{path} ({reason})" for path, reason in broken.items())
        raise UserError(
            f"{counted(len(broken), 'image')} cannot be read: {found}; replace the files or remove "
            f"them from the data."
        )


def find_unreadable(
    names: Iterable[str], *, whole: bool, say: Callable[[str], None]
) -> dict[str, str]:
    """Find the images of some registered data sets that cannot be decoded.

    Args:
        names: in Detectron2's catalog.
        whole: decode every image; otherwise only those of own data whose file lacks its end.
        say: takes lines of progress.

    Returns:
        Path of each such image -> the reason.
    """
    names = [name for name in dict.fromkeys(names) if whole or dataset_report(name) is not None]
    records = [record for name in names for record in DatasetCatalog.get(name)]
    paths = list(dict.fromkeys(record["file_name"] for record in records))

    def check(path: str) -> str:
        return why_unreadable(path) if whole or not _has_end(path) else ""

    broken = {}
    workers = cpu_count() if whole else 16  # decoding takes the cores, reading waits for the disk
    with ThreadPoolExecutor(workers) as pool, Loop("checking images", len(paths), say) as loop:
        for path, reason in zip(paths, pool.map(check, paths), strict=True):
            if reason:
                broken[path] = reason
            loop.tick()
    return broken


def why_unreadable(path: str | os.PathLike[str]) -> str:
    """Return the reason why an image cannot be decoded; an empty string if it can."""
    try:
        read_picture(path)
    except FileNotFoundError:
        return "missing"
    except (OSError, DecodeError) as error:
        return " ".join(str(error).split())
    return ""


def _has_end(path: str | os.PathLike[str]) -> bool:
    """Return True unless a JPEG or PNG lacks the bytes it should end with."""
    try:
        with open_regular(path) as file:
            end = _ENDS.get(file.read(2), b"")
            file.seek(-min(_TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
            return end in file.read(_TAIL)
    except OSError:
        return False

"""Image files of a data set: the one place that decides which file is the picture of an entry.

A file that an entry names exactly is never given to another entry.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from moco_det.data.datasets.findings import DatasetReport

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .tif .tiff .webp .gif".split()  # noqa: SIM905
)
SEARCHED = 20_000  # files that are looked through for the nearest one


def is_image(path: str | os.PathLike[str]) -> bool:
    """True if a file name ends as images do."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def files_below(folder: Path) -> Iterator[tuple[str, str]]:
    """(path below ``folder``, path) of all files, folder by folder, sorted.

    Links to folders are followed, except back to a folder above. Hidden files and folders are left
    out, such as the ``._1.xml`` that macOS leaves behind.
    """
    start = len(os.path.join(folder, ""))
    for root, folders, files in os.walk(folder, followlinks=True):
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [
            name for name in shown if not _leads_back(os.path.join(root, name), os.fspath(folder))
        ]
        for file in sorted(files):
            if not file.startswith("."):
                path = os.path.join(root, file)
                yield path[start:], path


def _leads_back(folder: str, start: str) -> bool:
    """True for a link to a folder that holds it: one on the way from ``start``, or above that."""
    if not os.path.islink(folder):
        return False
    real, above = os.path.realpath(folder), os.path.dirname(folder)
    if os.path.join(os.path.realpath(start), "").startswith(os.path.join(real, "")):
        return True
    while len(above) > len(start):
        if os.path.realpath(above) == real:
            return True
        above = os.path.dirname(above)
    return False


def folded(name: str) -> str:
    """A path without what systems and tools write in several ways.

    These are the separator, percent-encoding, upper and lower case, and the Unicode form.
    """
    return unicodedata.normalize("NFC", unquote(name.replace("\\", "/"))).casefold()


class ImageFolder:
    """The files of an image folder, listed when the first entry's file is not where it should be.

    Args:
        folder: what the entries' names are relative to.
        around: folders to look through for the nearest file where ``folder`` holds none.
    """

    def __init__(self, folder: Path, around: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.around = around
        self._by_name: dict[str, list[str]] | None = None  # folded bare name -> paths below

    def find(self, names: Sequence[str], report: DatasetReport) -> list[Path | None]:
        """The file of each entry; the report names those found elsewhere and those missing."""
        found = [self._exact(name) for name in names]
        missing = [index for index, path in enumerate(found) if path is None]
        claimed = {os.path.normpath(path) for path in found if path is not None}
        candidates = {index: self._candidate(names[index], claimed) for index in missing}
        wanted = Counter(candidates.values())
        named = False  # the nearest file is looked for once
        for index in missing:
            path = candidates[index]
            if path is None or wanted[path] > 1:
                self._report_missing(names[index], report, nearest=not named)
                named = True
                continue
            below = os.path.relpath(path, self.folder).replace(os.sep, "/")
            name = names[index].replace("\\", "/")
            if name.rpartition("/")[2] == below.rpartition("/")[2]:
                report.add("image in another folder", names[index], action="found by its name")
            else:
                kind = "image name in another spelling"
                report.add(kind, names[index], f"the file is {below}", action="found")
            found[index] = Path(path)
        return found

    def _exact(self, name: str) -> Path | None:
        for written in dict.fromkeys((name, name.replace("\\", "/"))):
            path = os.path.join(self.folder, written)
            if os.path.isfile(path):
                return Path(path)
        return None

    def _candidate(self, name: str, claimed: set[str]) -> str | None:
        """The only file of this name whose folders do not contradict the entry's."""
        parts = folded(name).split("/")
        best: list[str] = []
        longest = 0
        for below in self._listed().get(parts[-1], ()):
            path = os.path.normpath(os.path.join(self.folder, below))
            there = folded(below).split("/")
            shared = min(len(parts), len(there))
            if path in claimed or parts[-shared:] != there[-shared:] or shared < longest:
                continue
            best = [*(best if shared == longest else []), path]
            longest = shared
        return best[0] if len(best) == 1 else None

    def _listed(self) -> dict[str, list[str]]:
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for below, _ in files_below(self.folder):
                self._by_name[folded(below).rpartition("/")[2]].append(below)
        return self._by_name

    def _report_missing(self, name: str, report: DatasetReport, *, nearest: bool) -> None:
        where = f"looked for {os.path.join(self.folder, name)}"
        if nearest:
            near = self.nearest(name)
            where += f"; the nearest file is {near}" if near else "; no file has such a name"
        report.add("image missing", name, where, action="image skipped")

    def nearest(self, name: str) -> str | None:
        """The file whose name is closest, in the folder or else around it."""
        bare = folded(name).rpartition("/")[2]
        listed = {key: below for key, (below, *_) in self._listed().items() if is_image(key)}
        near = closest(bare, listed)
        if near is not None:
            return os.path.join(self.folder, listed[near])
        for folder in self.around:
            for number, (below, path) in enumerate(files_below(folder)):
                if folded(below).rpartition("/")[2] == bare:
                    return path
                if number > SEARCHED:
                    break
        return None


def closest(name: str, names: Sequence[str] | dict[str, str]) -> str | None:
    """The most similar of some names; None where none is similar."""
    if name in names:
        return name
    stem = os.path.splitext(name)[0]
    for other in names:
        if os.path.splitext(other)[0] == stem:
            return other
    near = difflib.get_close_matches(name, list(names)[:SEARCHED], n=1, cutoff=0.8)
    return near[0] if near else None

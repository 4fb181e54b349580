"""Image sources: folder trees, lists of paths, COCO files and tar shards.

Paths are stored flat, as one ``bytes`` object and an array of offsets instead of a list of strings:
a million of them take little more memory than their characters, and forked workers keep sharing
that memory, because reading a path touches no reference count of its own.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from moco_common.errors import UserError
from moco_common.images import read_regular
from pretrain.data.shards import open_shards
from pretrain.data.source_base import EXTENSIONS, Source

SAMPLE = 4096  # number of files, evenly spaced, whose sizes are compared on resume
_KINDS = "a folder, a .txt list, coco:JSON:IMAGES or shards:URL"


class FileSource(Source):
    """A source of image files, one image per file."""

    def __init__(self) -> None:
        self._roots: list[bytes] = []
        self._starts = np.zeros(0, np.int64)  # index of the first image of each root
        self._paths = b""  # relative to their root, concatenated
        self._ends = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> bytes:
        return read_regular(self._path(index))

    def name(self, index: int) -> str:
        return os.fsdecode(self._path(index))

    def fingerprint(self) -> dict[str, str]:
        """Return digests of all names below their roots, and of the sizes of `SAMPLE` files."""
        names = hashlib.sha256(self._paths + self._ends.tobytes()).hexdigest()
        sizes = hashlib.sha256()
        for index in range(0, len(self), max(1, len(self) // SAMPLE)):
            try:
                sizes.update(b"%d " % os.stat(self._path(index)).st_size)
            except OSError:
                sizes.update(b"? ")
        return {"names": names, "sizes": sizes.hexdigest()}

    def _path(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        root = self._roots[int(np.searchsorted(self._starts, index, side="right")) - 1]
        start = self._ends[index - 1] if index else 0
        return os.path.join(root, self._paths[start : self._ends[index]])


def open_source(specs: str | Sequence[str]) -> Source:
    """Open one or more sources as one, in the given order.

    Args:
        specs: each is a folder (searched recursively, links followed, sorted by path), a ``.txt``
            file with one path per line, absolute or relative to the file's folder, or
            ``coco:JSON:IMAGES`` for the ``images`` of a COCO file. Alternatively, all are
            ``shards:URL``, tar files (see `shards`). Lists and COCO files keep their order.

    Raises:
        UserError: a source is missing or malformed, or has no images. Listed images are not
            checked until they are read.
    """
    specs = [specs] if isinstance(specs, str) else specs
    shards = [spec for spec in specs if spec.startswith("shards:")]
    if shards:
        if len(shards) < len(specs):
            raise UserError(f"{shards[0]} cannot be mixed with files: give only shards, or none")
        return open_shards([spec.removeprefix("shards:") for spec in shards])
    paths, ends, labels = bytearray(), array("q"), array("i")
    classes: dict[str, int] = {}
    source = FileSource()
    starts = []
    for spec in specs:
        root, entries = _open_one(os.path.expanduser(spec))
        source._roots.append(root)
        starts.append(len(ends))
        for path, folder in entries:
            paths += path
            ends.append(len(paths))
            labels.append(-1 if folder is None else classes.setdefault(folder, len(classes)))
        if len(ends) == starts[-1]:
            raise UserError(
                f"{spec} contains no images: give a folder of images, a .txt list or a COCO file"
            )
    if not starts:
        raise UserError(f"no image source: give {_KINDS}")
    source._starts = np.array(starts, np.int64)
    source._paths = bytes(paths)
    source._ends = np.array(ends, np.int64)
    if classes:
        source.classes = tuple(sorted(classes))
        rank = np.array([source.classes.index(name) for name in classes] + [-1], np.int32)
        source.labels = rank[np.array(labels, np.int32)]  # -1 picks the last entry: -1
    return source


Entries = Iterator[tuple[bytes, str | None]]  # (path relative to the root, class folder or None)


def _open_one(spec: str) -> tuple[bytes, Entries]:
    if spec.startswith("coco:"):
        _, _, rest = spec.partition(":")
        annotations, separator, images = rest.partition(":")
        if not separator:
            raise UserError(f"{spec} names no image folder: write coco:JSON:IMAGES")
        if not os.path.isdir(images):
            raise UserError(f"{spec}: the image folder {images} does not exist")
        return os.fsencode(images), _coco_entries(annotations)
    if os.path.isdir(spec):
        return os.fsencode(spec), _tree_entries(os.fsencode(spec))
    if not os.path.exists(spec):
        raise UserError(f"{spec} does not exist: give {_KINDS}")
    if not spec.endswith(".txt"):
        raise UserError(f"{spec} is neither a folder nor a .txt list: give {_KINDS}")
    return os.fsencode(os.path.dirname(spec)), _list_entries(spec)


def _tree_entries(
    root: bytes, inside: bytes = b"", label: str | None = None, above: frozenset[str] = frozenset()
) -> Entries:
    """Yield the images below a folder, depth first and sorted, skipping hidden files and cycles."""
    real = os.path.realpath(os.fsdecode(os.path.join(root, inside)))
    if real in above:
        return
    files, folders = [], []
    with os.scandir(os.path.join(root, inside)) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                files.append(entry.name)
    for name in sorted(files):
        yield os.path.join(inside, name), label
    for name in sorted(folders):
        below = label if label is not None else os.fsdecode(name)
        yield from _tree_entries(root, os.path.join(inside, name), below, above | {real})


def _list_entries(file: str) -> Entries:
    with open(file, "rb") as lines:
        for line in lines:
            path = line.removeprefix(b"\xef\xbb\xbf").strip()
            if path:
                yield path, None


def _coco_entries(file: str) -> Entries:
    try:
        with open(file, encoding="utf-8") as stream:
            images = json.load(stream)["images"]
        names = [image["file_name"] for image in images]
    except OSError as error:
        raise UserError(f"cannot read the COCO file {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not a COCO file whose `images` each have a `file_name`: {error!r}"
        ) from None
    for name in names:
        yield os.fsencode(name), None

"""Image sources: folder trees, lists of paths, COCO files, frames of videos and tar shards.

Paths are stored flat, as one ``bytes`` object and an array of offsets instead of a list of strings:
a million of them take little more memory than their characters, and forked workers keep sharing
that memory, because reading a path touches no reference count of its own.
"""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from moco_common.errors import UserError
from moco_common.files import open_regular, read_json, read_regular
from moco_common.images import is_picture
from pretrain.data.shards import open_shards
from pretrain.data.source_base import EXTENSIONS, OTHER_EXTENSIONS, PassedOver, Source
from pretrain.data.video import extract_frames

SAMPLE = 4096  # number of files, evenly spaced, whose sizes are compared on resume
LONGEST_PATH = 2**14  # bytes of a line of a list, several times the limit of Linux
_KINDS = "a folder, a .txt list, coco:JSON:IMAGES, video:FILE or shards:URL"


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
        specs: each is a folder (searched recursively, links followed, sorted by path; a file whose
            ending is unknown is recognised by its content), a ``.txt`` file with one path per line,
            absolute or relative to the file's folder, ``coco:JSON:IMAGES`` for the ``images`` of a
            COCO file, or ``video:FILE?every=N`` for frames of a video (see `video`). Alternatively,
            all are ``shards:URL``, tar files (see `shards`). Lists, COCO files and videos keep
            their order.

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
        passed = PassedOver()
        root, entries = _open_one(os.path.expanduser(spec), passed)
        source._roots.append(root)
        starts.append(len(ends))
        for path, folder in entries:
            paths += path
            ends.append(len(paths))
            labels.append(-1 if folder is None else classes.setdefault(folder, len(classes)))
        if len(ends) == starts[-1]:
            found = f" ({passed})" if str(passed) else ""
            raise UserError(
                f"{spec} contains no images{found}: give a folder of images, a .txt list or a COCO "
                f"file"
            )
        if str(passed):
            source.notes += (f"{spec}: {passed}",)
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


def _open_one(spec: str, passed: PassedOver) -> tuple[bytes, Entries]:
    if spec.startswith("coco:"):
        _, _, rest = spec.partition(":")
        annotations, separator, images = rest.partition(":")
        if not separator:
            raise UserError(f"{spec} names no image folder: write coco:JSON:IMAGES")
        if not os.path.isdir(images):
            raise UserError(f"{spec}: the image folder {images} does not exist")
        return os.fsencode(images), _coco_entries(annotations)
    if spec.startswith("video:"):
        frames = extract_frames(spec.removeprefix("video:"))
        passed.frames = frames.note
        return os.fsencode(frames.folder), ((os.fsencode(name), None) for name in frames.names)
    if os.path.isdir(spec):
        return os.fsencode(spec), _tree_entries(os.fsencode(spec), passed)
    if not os.path.exists(spec):
        raise UserError(f"{spec} does not exist: give {_KINDS}")
    if not spec.endswith(".txt"):
        raise UserError(f"{spec} is neither a folder nor a .txt list: give {_KINDS}")
    return os.fsencode(os.path.dirname(spec)), _list_entries(spec)


def _tree_entries(root: bytes, passed: PassedOver) -> Entries:
    """Yield the images below a folder, depth first and sorted, skipping hidden files and cycles."""
    # Folders left to search: path below the root, class, and the real paths of those above it.
    todo: list[tuple[bytes, str | None, frozenset[bytes]]] = [(b"", None, frozenset())]
    while todo:
        inside, label, above = todo.pop()
        folder = os.path.join(root, inside)
        real = os.path.realpath(folder)
        if real in above:
            continue
        files: list[bytes] = []
        folders: list[bytes] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.startswith(b"."):
                        _sort(entry, files, folders, passed)
        except OSError as error:
            if not inside:
                raise UserError(
                    f"cannot read the folder {os.fsdecode(root)}: {error.strerror}"
                ) from None
            passed.unreadable.append(f"{os.fsdecode(inside)}: {error.strerror}")
        for name in sorted(files):
            yield os.path.join(inside, name), label
        for name in sorted(folders, reverse=True):
            below = label if label is not None else os.fsdecode(name)
            todo.append((os.path.join(inside, name), below, above | {real}))


def _sort(
    entry: os.DirEntry[bytes], files: list[bytes], folders: list[bytes], passed: PassedOver
) -> None:
    """Add the name of an entry to the images or the folders, or count it as passed over."""
    name = os.fsdecode(entry.name)
    try:
        if entry.is_dir():
            folders.append(entry.name)
        elif not entry.is_file():  # a broken link, a pipe, a device
            passed.unreadable.append(f"{name}: not a regular file")
        elif _is_image(entry):
            files.append(entry.name)
        else:
            passed.add(name)
    except OSError as error:  # a link to itself, or into a folder that cannot be entered
        passed.unreadable.append(f"{name}: {error.strerror}")


def _is_image(entry: os.DirEntry[bytes]) -> bool:
    path = os.fsdecode(entry.path)
    ending = os.path.splitext(path)[1].lower()
    return ending in EXTENSIONS or (ending not in OTHER_EXTENSIONS and is_picture(path))


def _list_entries(file: str) -> Entries:
    try:
        with open_regular(file, most=sys.maxsize) as lines:
            number = 0
            while line := lines.readline(LONGEST_PATH):
                number += 1
                if b"\0" in line or len(line) == LONGEST_PATH:
                    raise UserError(
                        f"{file}, line {number}, is not a path: save the list as UTF-8, one path "
                        f"per line"
                    )
                path = line.removeprefix(b"\xef\xbb\xbf").strip()
                if path:
                    yield path, None
    except OSError as error:
        raise UserError(f"cannot read the list {file}: {error.strerror or error}") from None


def _coco_entries(file: str) -> Entries:
    try:
        content = read_json(file)
    except OSError as error:
        raise UserError(f"cannot read the COCO file {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{file} is not a COCO file: {error}") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise UserError(f"{file} is not a COCO file: it has no list called `images`")
    for number, image in enumerate(images):
        name = image.get("file_name") if isinstance(image, dict) else None
        try:
            if not isinstance(name, str) or not name or "\0" in name:
                raise ValueError
            path = os.fsencode(name)
        except ValueError:
            raise UserError(
                f"{file} is not a COCO file whose `images` each have a `file_name`: number "
                f"{number} has {json.dumps(name)[:80]}"
            ) from None
        yield path, None

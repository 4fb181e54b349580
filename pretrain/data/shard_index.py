"""Number and places of the images in tar files, determined once and then cached."""

import hashlib
import json
import os
import posixpath
import re
import subprocess
import tarfile
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np

from moco_common.errors import UserError
from moco_common.files import MAX_BYTES, parse_json, read_json, replace_file
from moco_common.images import is_picture
from pretrain.data.source_base import EXTENSIONS, OTHER_EXTENSIONS, PassedOver

LOST = "the shard is damaged or cut off here, and what followed in it is lost"
PAUSES = (1.0, 5.0, 20.0)  # seconds before each new attempt to count a shard
GRACE = 1.0  # seconds in which a command whose output has ended also exits
DAMAGE = (tarfile.TarError, EOFError, ValueError, zlib.error)  # what a damaged file raises
LARGEST_MEMBER = 2**36  # bytes; tarfile takes time for what a header claims, whatever is there
MAX_DESCRIPTION = 2**20  # bytes of a member that describes the next one, such as its long name
_DESCRIPTIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
LARGEST_SAMPLE = 16  # images of a sample among which one called NAME.EXTENSION is looked for
_RULES = "2"  # version of the rules that decide which members are images, for the caches


def expand_urls(spec: str) -> list[str]:
    """Expand the braces of a URL to the URLs of the shards."""
    return list(_webdataset().shardlists.expand_urls(spec))


def local_path(url: str) -> str | None:
    """The local file that a URL names; None for a pipe or a remote URL."""
    if url.startswith("file:"):
        return re.sub("^file:(//)?", "", url)
    return None if re.match(r"[a-z][a-z0-9+.-]+:", url) else os.path.expanduser(url)


def load_index(paths: Sequence[str], passed: PassedOver) -> np.ndarray:
    """Load or make an index, int64 (shards + images, 2): number of images and bytes of each shard,
    then offset and size of each image. If it is made, ``passed`` counts what is not used."""
    name = f".images-{_digest(paths)}.npy"
    caches = [Path(os.path.dirname(paths[0]) or ".", name), _user_cache() / name]
    for cache in caches:
        if cache.exists():
            return _mapped(cache)
    rows = [_index_tar(path, passed) for path in _progress(paths)]
    heads = [[len(r), os.path.getsize(path)] for r, path in zip(rows, paths, strict=True)]
    table = np.concatenate([np.array(heads, np.int64), *rows])
    return _mapped(_write_to_one_of(caches, lambda file: np.save(file, table)))


def _mapped(file: Path) -> np.ndarray:
    table: np.ndarray = np.load(file, mmap_mode="r")
    return table


def _index_tar(path: str, passed: PassedOver) -> np.ndarray:
    """Offset and size of each image; one more, past the end of the file, stands for what a damaged
    file has lost."""
    size = os.path.getsize(path)
    rows: list[tuple[int, int]] = []
    try:
        with tarfile.open(path, "r:", tarinfo=_Header) as tar:
            for member, _ in _images(tar, passed):
                rows.append((member.offset_data, member.size))
    except DAMAGE:  # a member that is cut off is listed and fails when it is read
        if not rows or sum(rows[-1]) <= size or rows[-1][1] > MAX_BYTES:
            rows.append((size, 1))
    return np.array(rows, np.int64).reshape(-1, 2)


class _Header(tarfile.TarInfo):
    """A member's header; refuses sizes that make Python's tarfile run in circles or fill memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        most = MAX_DESCRIPTION if header.type in _DESCRIPTIONS else LARGEST_MEMBER
        if not 0 <= header.size <= most:
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        return header


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file, keeping none of them.

    Raises:
        tarfile.TarError: the file is damaged.
    """
    end = -1
    while True:
        try:
            member = tar.next()
        except (IndexError, OverflowError, RecursionError) as error:  # of damaged headers
            raise tarfile.ReadError(str(error)) from None
        if member is None:
            return
        if not 0 <= member.size <= LARGEST_MEMBER or tar.offset <= end:  # as a pax header says
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        end = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # which otherwise holds every member
        yield member


def _images(
    tar: tarfile.TarFile, passed: PassedOver, load: bool = False
) -> Iterator[tuple[tarfile.TarInfo, bytes | str]]:
    """Yield the images of a tar file, one of each sample.

    As in webdataset, consecutive files that share a name up to the first dot form a sample, of
    which the first image called NAME.EXTENSION is used. Where the first `LARGEST_SAMPLE` images
    hold none such, the dots are part of the files' names (`... at 10.11.02.jpg`) and every image is
    used.

    Args:
        load: read the images too.

    Yields:
        The member, and its content or the reason why it has none; "" without ``load``.

    Raises:
        tarfile.TarError, EOFError, ValueError, zlib.error, OSError: the file is damaged, or cannot
            be read further.
    """
    sample, taken, dotted = "", False, False  # dotted: the dots are part of the names
    waiting: list[tuple[tarfile.TarInfo, bytes | str]] = []
    try:
        for member in _members(tar):
            folder, _, name = member.name.rpartition("/")
            if not member.isreg() or member.issparse() or name.startswith("."):
                continue
            if re.match(r"__[^/]*__($|/)", member.name):  # webdataset's own description
                continue
            extension = os.path.splitext(name)[1].lower()
            if extension in OTHER_EXTENSIONS:
                continue
            stem, _, ending = name.partition(".")
            same = sample == f"{folder}/{stem}"
            if same and taken:
                passed.add(name)
                continue
            known = extension in EXTENSIONS
            content = _content(tar, member) if load or not known else ""
            if not known and not (isinstance(content, bytes) and is_picture(content)):
                passed.add(name)
                continue
            if not same:
                yield from waiting
                waiting, sample, taken, dotted = [], f"{folder}/{stem}", False, False
            item = (member, content if load else "")
            if dotted:
                yield item
            elif "." in ending:
                waiting.append(item)
                if len(waiting) > LARGEST_SAMPLE:
                    yield from waiting
                    waiting, dotted = [], True
            else:
                for other, _ in waiting:
                    passed.add(other.name)
                waiting, taken = [], True
                yield item
    except DAMAGE:
        yield from waiting
        raise
    yield from waiting


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | str:
    """The content of a member, or the reason why it is not read."""
    if member.size > MAX_BYTES:
        return too_large(member.size)
    file = tar.extractfile(member)
    return file.read() if file else LOST


def too_large(size: int) -> str:
    """The reason why an image of this size in bytes is not read."""
    return f"{size:,} bytes are more than the limit of {MAX_BYTES:,}"


def load_sizes(urls: Sequence[str], passed: PassedOver) -> np.ndarray:
    """Number of images in each shard, int64 (shards,): published, cached or counted.

    If they are counted, ``passed`` counts what is not used.

    Raises:
        UserError: a shard cannot be read to its end after several attempts.
    """
    sizes = _published_sizes(urls)
    if sizes is None:
        cache = _user_cache() / f"counts-{_digest(urls)}.json"
        sizes = read_json(cache) if cache.exists() else {}
        if missing := [url for url in urls if url not in sizes]:
            sizes |= _count_all(missing, cache, sizes, passed)
    return np.array([int(sizes[url]) for url in urls], np.int64)


def _count_all(
    urls: Sequence[str], cache: Path, known: dict[str, int], passed: PassedOver
) -> dict[str, int]:
    """Count shards; only what was read to its end is cached, also if a later shard fails."""
    clean: dict[str, int] = {}
    damaged: dict[str, int] = {}
    try:
        for url in _progress(urls):
            count, whole = _count(url, passed)
            (clean if whole else damaged)[url] = count
    finally:
        if clean:
            text = json.dumps(known | clean).encode()
            _write_to_one_of([cache], lambda file: file.write(text))
    return clean | damaged


def _published_sizes(urls: Sequence[str]) -> dict[str, int] | None:
    """The content of the `sizes.json` beside the shards, if there is one that names them all."""
    sizes: dict[str, int] = {}
    for folder in {posixpath.dirname(url) for url in urls}:
        if folder.startswith("pipe:"):
            return None
        try:
            with _webdataset().gopen.gopen(posixpath.join(folder, "sizes.json")) as file:
                found = parse_json(file.read())
        except (OSError, ValueError):  # there need not be one
            return None
        if not isinstance(found, dict):
            return None
        sizes |= {posixpath.join(folder, name): int(count) for name, count in found.items()}
    return sizes if all(url in sizes for url in urls) else None


def _count(url: str, passed: PassedOver) -> tuple[int, bool]:
    """Number of images in a shard, and whether it was read to its end.

    A connection that breaks off is tried again. A file that ends in the same place twice although
    it was transferred without an error is damaged: one more image then stands for what is lost, as
    in the index.
    """
    cut_at = None
    for pause in (*PAUSES, None):
        count = 0
        try:
            here = PassedOver()
            for _ in read_samples(url, here):
                count += 1
            passed.endings += here.endings
            return count, True
        except DAMAGE as error:
            if count == cut_at:
                return count + 1, False
            cut_at, reason = count, str(error)
        except OSError as error:
            cut_at, reason = None, str(error)
        if pause is not None:
            time.sleep(pause)
    raise UserError(
        f"the shard {url} could not be read to its end in {len(PAUSES) + 1} attempts "
        f"({' '.join(reason.split())}): check the connection and start again."
    )


def read_samples(url: str, passed: PassedOver | None = None) -> Generator[bytes | str, None, None]:
    """Read the images of one shard through webdataset; a str is the reason why one is not read.

    Raises:
        OSError: the URL cannot be opened, or the command behind it failed.
        tarfile.TarError, EOFError, ValueError, zlib.error: the file is damaged.
    """
    stream = _webdataset().gopen.gopen(url)
    command = getattr(stream, "proc", None)
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
            for _, content in _images(tar, passed or PassedOver(), load=True):
                yield content
        if command is not None:  # a file cut between two members is no error to the tar reader
            _check_end(stream)
    except DAMAGE:
        if command is not None:
            _check_end(stream)  # raises the error of the command, if that is the cause
        raise
    finally:
        if command is not None:
            command.kill()  # it would wait forever if a forked worker holds the pipe's other end
        with suppress(OSError):  # from a command whose pipe is closed early
            stream.close()


def _check_end(stream: Any) -> None:
    """Raise `OSError` if the command behind a stream has failed."""
    with suppress(subprocess.TimeoutExpired):  # it has more to write: it did not fail
        stream.proc.wait(GRACE)
        stream.wait_for_child()


def _webdataset() -> Any:
    """The modules of the library, some of whose functions shadow the module of the same name."""
    try:
        import_module("webdataset")
    except ImportError:
        raise UserError(
            "webdataset, which reads shards, is not installed: run pip install 'moco-det[shards]'."
        ) from None
    names = ("gopen", "shardlists", "tariterators")
    return SimpleNamespace(**{name: import_module(f"webdataset.{name}") for name in names})


def _digest(urls: Sequence[str]) -> str:
    """A digest that differs for other shards and for local files that have changed; a folder that
    has only moved keeps it."""
    lines = [_RULES]
    for url in urls:
        path = local_path(url)
        if path is None:
            lines.append(url)
        else:
            stat = os.stat(path)
            lines.append(f"{os.path.basename(path)}:{stat.st_size}:{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moco-det"


def _progress(items: Sequence[str]) -> Iterator[str]:
    from tqdm import tqdm

    return iter(tqdm(items, desc="indexing the shards", unit=" shards", delay=2))


def _write_to_one_of(paths: Sequence[Path], write: Callable[[IO[bytes]], object]) -> Path:
    """Write the file atomically at the first path that is writable."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return replace_file(path, write)
        except (OSError, UserError) as error:  # a full disk is a UserError
            reason = error
    raise UserError(f"The index of the shards cannot be written to {paths[-1]}: {reason}")

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
from moco_common.files import replace_file
from pretrain.data.source_base import EXTENSIONS

LOST = "the shard is damaged or cut off here, and what followed in it is lost"
PAUSES = (1.0, 5.0, 20.0)  # seconds before each new attempt to count a shard
GRACE = 1.0  # seconds in which a command whose output has ended also exits
DAMAGE = (tarfile.TarError, EOFError, ValueError, zlib.error)  # what a damaged file raises
_SUFFIXES = frozenset(extension.decode().removeprefix(".") for extension in EXTENSIONS)


def expand_urls(spec: str) -> list[str]:
    """Expand the braces of a URL to the URLs of the shards."""
    return list(_webdataset().shardlists.expand_urls(spec))


def local_path(url: str) -> str | None:
    """The local file that a URL names; None for a pipe or a remote URL."""
    if url.startswith("file:"):
        return re.sub("^file:(//)?", "", url)
    return None if re.match(r"[a-z][a-z0-9+.-]+:", url) else os.path.expanduser(url)


def load_index(paths: Sequence[str]) -> np.ndarray:
    """Load or make an index, int64 (shards + images, 2): number of images and bytes of each shard,
    then offset and size of each image."""
    name = f".images-{_digest(paths)}.npy"
    caches = [Path(os.path.dirname(paths[0]) or ".", name), _user_cache() / name]
    for cache in caches:
        if cache.exists():
            return _mapped(cache)
    rows = [_index_tar(path) for path in _progress(paths)]
    heads = [[len(r), os.path.getsize(path)] for r, path in zip(rows, paths, strict=True)]
    table = np.concatenate([np.array(heads, np.int64), *rows])
    return _mapped(_write_to_one_of(caches, lambda file: np.save(file, table)))


def _mapped(file: Path) -> np.ndarray:
    table: np.ndarray = np.load(file, mmap_mode="r")
    return table


def _index_tar(path: str) -> np.ndarray:
    """Offset and size of each image; one more, past the end of the file, stands for what a damaged
    file has lost."""
    size = os.path.getsize(path)
    base_plus_ext = _webdataset().tariterators.base_plus_ext
    rows: list[tuple[int, int]] = []
    last = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _ = base_plus_ext(member.name)
                if member.isreg() and key != last and _is_image(member.name):
                    rows.append((member.offset_data, member.size))
                    last = key
    except tarfile.TarError:  # a member that is cut off is listed and fails when it is read
        if not rows or sum(rows[-1]) <= size:
            rows.append((size, 1))
    return np.array(rows, np.int64).reshape(-1, 2)


def load_sizes(urls: Sequence[str]) -> np.ndarray:
    """Number of images in each shard, int64 (shards,): published, cached or counted.

    Raises:
        UserError: a shard cannot be read to its end after several attempts.
    """
    sizes = _published_sizes(urls)
    if sizes is None:
        cache = _user_cache() / f"counts-{_digest(urls)}.json"
        sizes = json.loads(cache.read_text()) if cache.exists() else {}
        if missing := [url for url in urls if url not in sizes]:
            sizes |= _count_all(missing, cache, sizes)
    return np.array([int(sizes[url]) for url in urls], np.int64)


def _count_all(urls: Sequence[str], cache: Path, known: dict[str, int]) -> dict[str, int]:
    """Count shards; only what was read to its end is cached, also if a later shard fails."""
    clean: dict[str, int] = {}
    damaged: dict[str, int] = {}
    try:
        for url in _progress(urls):
            count, whole = _count(url)
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
                found = json.loads(file.read())
        except (OSError, ValueError):  # there need not be one
            return None
        if not isinstance(found, dict):
            return None
        sizes |= {posixpath.join(folder, name): int(count) for name, count in found.items()}
    return sizes if all(url in sizes for url in urls) else None


def _count(url: str) -> tuple[int, bool]:
    """Number of images in a shard, and whether it was read to its end.

    A connection that breaks off is tried again. A file that ends in the same place twice although
    it was transferred without an error is damaged: one more image then stands for what is lost, as
    in the index.
    """
    cut_at = None
    for pause in (*PAUSES, None):
        count = 0
        try:
            for _ in read_samples(url):
                count += 1
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


def read_samples(url: str) -> Generator[bytes, None, None]:
    """Read the images of one shard with webdataset.

    Raises:
        OSError: the URL cannot be opened, or the command behind it failed.
        tarfile.TarError, EOFError, ValueError, zlib.error: the file is damaged.
    """
    wds = _webdataset()
    stream = wds.gopen.gopen(url)
    command = getattr(stream, "proc", None)
    try:
        files = wds.tariterators.tar_file_expander(
            [{"url": url, "stream": stream}], select_files=_is_image
        )
        for sample in wds.tariterators.group_by_keys(files):
            yield next(value for key, value in sample.items() if key in _SUFFIXES)
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


def _is_image(name: str) -> bool:
    return posixpath.basename(name).partition(".")[2].lower() in _SUFFIXES


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
    lines = []
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

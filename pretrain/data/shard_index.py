"""What tar files of images hold: how many, and where in the file; found out once, then kept."""

import hashlib
import json
import os
import posixpath
import re
import tarfile
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
_SUFFIXES = frozenset(extension.decode().removeprefix(".") for extension in EXTENSIONS)


def expand_urls(spec: str) -> list[str]:
    """The shards that a URL with braces stands for."""
    return list(_webdataset().shardlists.expand_urls(spec))


def local_path(url: str) -> str | None:
    """The file that a URL names on this machine; None for a pipe or a URL of elsewhere."""
    if url.startswith("file:"):
        return re.sub("^file:(//)?", "", url)
    return None if re.match(r"[a-z][a-z0-9+.-]+:", url) else os.path.expanduser(url)


def load_index(paths: Sequence[str]) -> np.ndarray:
    """int64 (shards + images, 2): count and bytes of each shard, offset and size of each image."""
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
    """Offset and size of each image; what is lost in a damaged file is one more, past its end."""
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
    except tarfile.TarError:  # a member that is cut off is listed, and fails when it is read
        if not rows or sum(rows[-1]) <= size:
            rows.append((size, 1))
    return np.array(rows, np.int64).reshape(-1, 2)


def load_sizes(urls: Sequence[str]) -> np.ndarray:
    """int64 (shards,): how many images each has."""
    cache = _user_cache() / f"sizes-{_digest(urls)}.json"
    sizes = json.loads(cache.read_text()) if cache.exists() else _published_sizes(urls)
    if sizes is None:
        sizes = {url: _count(url) for url in _progress(urls)}
        text = json.dumps(sizes).encode()
        _write_to_one_of([cache], lambda file: file.write(text))
    return np.array([int(sizes[url]) for url in urls], np.int64)


def _published_sizes(urls: Sequence[str]) -> dict[str, int] | None:
    """What the `sizes.json` beside the shards says, if there is one that names them all."""
    sizes: dict[str, int] = {}
    for folder in {posixpath.dirname(url) for url in urls}:
        if folder.startswith("pipe:"):
            return None
        try:
            with _webdataset().gopen.gopen(posixpath.join(folder, "sizes.json")) as file:
                found = json.loads(file.read())
            sizes |= {posixpath.join(folder, name): int(count) for name, count in found.items()}
        except Exception:  # of whatever opened the URL: there need not be one
            return None
    return sizes if all(url in sizes for url in urls) else None


def _count(url: str) -> int:
    count = 0
    try:
        for _ in read_samples(url):
            count += 1
    except Exception:  # as in the index, one image stands for what is lost
        count += 1
    return count


def read_samples(url: str) -> Generator[bytes, None, None]:
    """The images of one shard, by webdataset; raises whatever the URL or the tar file raise."""
    wds = _webdataset()
    stream, whole = wds.gopen.gopen(url), False
    try:
        files = wds.tariterators.tar_file_expander(
            [{"url": url, "stream": stream}], select_files=_is_image
        )
        for sample in wds.tariterators.group_by_keys(files):
            yield next(value for key, value in sample.items() if key in _SUFFIXES)
        whole = True
    finally:
        if not whole and (command := getattr(stream, "proc", None)) is not None:
            command.kill()  # it would wait for ever if a forked worker holds the pipe's other end
        with suppress(OSError):  # from the command behind a pipe that is closed early
            stream.close()


def _is_image(name: str) -> bool:
    return posixpath.basename(name).partition(".")[2].lower() in _SUFFIXES


def _webdataset() -> Any:
    """The library's modules; some of its functions hide the module of the same name."""
    try:
        import_module("webdataset")
    except ImportError:
        raise UserError(
            "shards are read by webdataset, which is not installed: "
            "run pip install 'moco-det[shards]'"
        ) from None
    names = ("gopen", "shardlists", "tariterators")
    return SimpleNamespace(**{name: import_module(f"webdataset.{name}") for name in names})


def _digest(urls: Sequence[str]) -> str:
    """Another one for other shards, and for local ones that have changed, but not moved."""
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

    return iter(tqdm(items, desc="looking through the shards, once", unit=" shards", delay=2))


def _write_to_one_of(paths: Sequence[Path], write: Callable[[IO[bytes]], object]) -> Path:
    """Writes the file at the first path that lets itself be written, whole or not at all."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return replace_file(path, write)
        except (OSError, UserError) as error:  # a full disk is a UserError
            reason = error
    raise UserError(f"the index of the shards cannot be written to {paths[-1]}: {reason}")

"""Atomic writes, which leave a file whole or not at all; reading of regular files only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from moco_common.errors import UserError

MAX_BYTES = 2**29  # of a file that is read whole, such as a picture
MAX_JSON_BYTES = 2**32  # of a JSON file; COCO's largest has 0.5 GB
_UNFINISHED = ".part"
_protected: list[Path] = []


def check_exists(path: str | Path, advice: str = "check the path") -> None:
    """Raise `UserError` if nothing exists at a path; a name with a colon (``https://...``,
    ``coco:...``) is not a path."""
    if ":" not in str(path) and not Path(path).expanduser().exists():
        raise UserError(f"{path} does not exist: {advice}.")


def open_regular(path: str | bytes | os.PathLike[str], most: int | None = MAX_BYTES) -> BinaryIO:
    """Open a regular file for reading; never wait for one of another kind.

    Args:
        most: largest size of the file in bytes; None for any.

    Raises:
        OSError: it cannot be opened, is too large, or is a pipe, device, socket or folder.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        name = os.fsdecode(path)
        if not stat.S_ISREG(status.st_mode):
            kind = IsADirectoryError if stat.S_ISDIR(status.st_mode) else OSError
            raise kind(f"{name} is not a regular file")
        if most is not None and status.st_size > most:
            raise OSError(f"{name} has {status.st_size:,} bytes, more than the limit of {most:,}")
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | bytes | os.PathLike[str], most: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file; see `open_regular`."""
    with open_regular(path, most) as file:
        return file.read()


def same_content(paths: Iterable[str]) -> list[list[str]]:
    """Group files with the same content; files that cannot be read have no copies.

    Only files of the same size are read.

    Returns:
        Groups of at least two paths, in the order of the paths.
    """
    by_size: dict[int, list[str]] = {}
    for path in dict.fromkeys(paths):
        with suppress(OSError):
            by_size.setdefault(os.stat(path).st_size, []).append(path)
    groups: dict[bytes, list[str]] = {}
    for alike in by_size.values():
        for path in alike if len(alike) > 1 else ():
            with suppress(OSError):
                groups.setdefault(hashlib.sha256(read_regular(path)).digest(), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def read_text(path: str | os.PathLike[str], most: int = MAX_BYTES) -> str:
    """Return the text of a regular UTF-8 file, with or without a byte order mark; what is not UTF-8
    becomes U+FFFD.

    Raises:
        UserError: the file cannot be read; see `open_regular`.
    """
    try:
        return read_regular(path, most).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {os.fspath(path)}: {error.strerror or error}.") from None


def read_json(path: str | os.PathLike[str], most: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a regular JSON file.

    Raises:
        OSError: see `open_regular`.
        ValueError: it is not JSON.
    """
    return parse_json(read_regular(path, most))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, or is nested too deeply or has numbers too long to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def make_folder(folder: Path, option: str) -> None:
    """Make a folder for results where it is missing, and check that files can be made in it.

    Args:
        option: the command-line option that names the folder, for the message.

    Raises:
        UserError: it is a file, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with full_disk_explained(folder), tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): choose another folder with {option}."
        ) from None


@contextmanager
def protecting(paths: Iterable[str | Path]) -> Iterator[None]:
    """Refuse to write over these input files within the block, by whatever path."""
    before = len(_protected)
    _protected.extend(path for path in map(Path, paths) if path.is_file())
    try:
        yield
    finally:
        del _protected[before:]


def check_output(path: Path) -> None:
    """Check that a file may be written, whether or not one is there.

    Raises:
        UserError: it is an input of this tool, or a device, a pipe or a folder.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path} is not a regular file and is not replaced: choose another name.")
    for source in _protected:
        if source.exists() and path.samefile(source):
            raise UserError(
                f"{path} is an input ({source}) and is not replaced: choose another output."
            )


@contextmanager
def replacing(
    path: str | Path, *, suffix: str = "", check: Callable[[Path], object] | None = None
) -> Iterator[Path]:
    """Yield an empty file beside ``path`` that takes its place in one step when the block ends
    without an error.

    A reader finds the old file or the new one, never half of either, even if this process is
    killed; `remove_unfinished` removes what a killed process leaves. Missing folders are created,
    and the file gets the permissions that the user's umask allows. A symbolic link stays: the file
    that it points to is replaced.

    Args:
        path: the file to write or replace.
        suffix: ending of the temporary file's name, for writers that choose a format by it.
        check: called with the finished file before it takes its place; if it raises, the old file
            stays.

    Raises:
        UserError: the disk is full, the quota exhausted, or the file may not be written (see
            `check_output`).
        OSError: the file cannot be written for another reason.
    """
    path = Path(path)
    with full_disk_explained(path):
        unfinished = new_beside(path, suffix)
        try:
            yield unfinished
            if check is not None:
                check(unfinished)
            put_in_place(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def new_beside(path: str | Path, suffix: str = "") -> Path:
    """Create an empty file in the folder of ``path``, which is created if missing.

    The first half of `replacing`, for writers that do not fit into a ``with`` block.
    """
    path = _behind_links(path)
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED + suffix
        )
    except FileNotFoundError:  # a folder of the kernel, to which a link led
        if not path.parent.is_dir():
            raise
        raise UserError(
            f"{path} cannot be written, because {path.parent} takes no new files: choose another "
            f"output."
        ) from None
    os.close(handle)
    return Path(name)


def put_in_place(unfinished: Path, path: str | Path) -> Path:
    """Rename a file from `new_beside`, filled and closed, to ``path`` in one step."""
    path = _behind_links(path)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.chmod(0o666 & ~_umask())
    os.replace(unfinished, path)
    sync_folder(path.parent)
    return path


def _behind_links(path: str | Path) -> Path:
    """Return the file that a symbolic link points to, or the path itself."""
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def replace_file(
    path: str | Path,
    write: Callable[[IO[bytes]], object],
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Let ``write`` fill a new binary file that takes the place of ``path`` (see `replacing`)."""
    with replacing(path, check=check) as unfinished, unfinished.open("w+b") as file:
        sink = _Sink(file)
        try:
            write(cast(IO[bytes], sink))
        except RuntimeError:
            if sink.error:
                raise sink.error from None
            raise
    return Path(path)


class _Sink:
    """A binary file that remembers why it could not be written: ``torch.save`` swallows the OSError
    and raises a RuntimeError about the consequences."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def replace_text(path: str | Path, text: str) -> Path:
    """`replace_file` for text, in UTF-8."""
    return replace_file(path, lambda file: file.write(text.encode()))


def write_json_atomically(path: str | os.PathLike[str], content: Any) -> None:
    """`replace_file` for JSON."""
    # One string, because json.dump would use the slow pure-Python encoder.
    replace_text(Path(path), json.dumps(content))


def append_text(path: Path, text: str) -> None:
    """Append to a text file; a killed process may leave half a line.

    Raises:
        UserError: the disk is full.
    """
    with full_disk_explained(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def link_file(path: Path, name: Path) -> None:
    """Make ``name``, in the same folder, a hard link to ``path`` in one step; a copy where the file
    system has no links."""
    with full_disk_explained(name):
        unfinished = name.with_name(f".{name.name}{_UNFINISHED}")
        unfinished.unlink(missing_ok=True)
        try:
            os.link(path, unfinished)
        except OSError:
            shutil.copyfile(path, unfinished)
        os.replace(unfinished, name)
        sync_folder(name.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of killed processes; no other process may be writing to the
    folder."""
    for path in folder.glob(f".*{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure, as fsync does for a file's content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot and need not do this
            raise
    finally:
        os.close(handle)


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn errors about a full disk into a `UserError`."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"{path} could not be written ({os.strerror(error.errno or 0)}): files saved earlier "
            f"are intact; free some space and run the command again (a run resumes with --resume)."
        ) from None


def is_full_disk(error: BaseException | None) -> bool:
    """Return True for an exception about a full disk, an exhausted quota or a size limit."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and error.errno in full


@contextmanager
def full_disk_left_to_caller() -> Iterator[None]:
    """Suppress the tracebacks of threads that fail on a full disk, such as TensorBoard's writer,
    which raises the same error again in the thread that uses it."""
    before = threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        if not is_full_disk(args.exc_value):
            before(args)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = before


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask

"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pretrain.errors import UserError

_UNFINISHED = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, to be filled, which takes its place in one step when the block
    ends without an error.

    A reader finds the old file or the new one, never half of either, whatever kills this process;
    `remove_unfinished` clears away what a killed one leaves. The folder must exist.

    Raises:
        UserError: the disk is full (or the quota used up).
        OSError: it cannot be written for another reason.
    """
    with full_disk_explained(path):
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED
        )
        os.close(handle)
        unfinished = Path(name)
        try:
            yield unfinished
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.chmod(0o644)
            os.replace(unfinished, path)
            sync_folder(path.parent)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Let ``write`` fill a new file that takes the place of ``path``, see `replacing`."""
    with replacing(path) as unfinished, unfinished.open("w+b") as file:
        write(file)
    return path


def replace_text(path: Path, text: str) -> Path:
    """`replace_file` for text, in UTF-8."""
    return replace_file(path, lambda file: file.write(text.encode()))


def append_text(path: Path, text: str) -> None:
    """Add to a text file; a killed process may leave half a line.

    Raises:
        UserError: the disk is full.
    """
    with full_disk_explained(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def link_file(path: Path, name: Path) -> None:
    """Make ``name``, in the same folder, a second name of ``path`` in one step; a copy where the
    file system has no links."""
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
    """Remove what killed processes were writing. Nobody else may be writing into the folder."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder survive a loss of power, as fsync does for a file's content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and need not
            raise
    finally:
        os.close(handle)


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{path} could not be written ({os.strerror(error.errno)}): what was saved before is "
            f"whole; make room and go on with --resume."
        ) from None

"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def replace_file(
    path: str | Path,
    write: Callable[[IO[bytes]], object],
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Let `write` fill a new binary file, then put it in the place of `path` in one step.

    A reader sees the old file or the new one, never half of either, whatever stops the process.
    Missing folders are made. `check` is called with the finished file before it gets its name;
    if it raises, the old file stays.
    """
    unfinished = new_beside(path)
    try:
        with unfinished.open("wb") as file:
            write(file)
        if check is not None:
            check(unfinished)
        return put_in_place(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def replace_text(path: str | Path, text: str) -> Path:
    """`replace_file` for text, in UTF-8."""
    return replace_file(path, lambda file: file.write(text.encode("utf-8")))


def new_beside(path: str | Path, suffix: str = "") -> Path:
    """A new empty file in the folder of `path`, which is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=suffix)
    os.close(handle)
    return Path(name)


def put_in_place(unfinished: Path, path: str | Path) -> Path:
    """Give a file of `new_beside`, filled and closed, the name `path` in one step."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.chmod(0o666 & ~_umask())
    return unfinished.replace(path)


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask

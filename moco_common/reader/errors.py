"""Exceptions of the reader, and one sentence for each kind of file that cannot be read."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moco_common.errors import UserError

# First bytes of files that are often saved or downloaded instead of a checkpoint.
_OTHER_FORMATS = (
    (b"\x89HDF", "an HDF5 file (Keras?)"),
    (b"\x1f\x8b", "compressed with gzip; decompress it first"),
    (b"BZh", "compressed with bzip2; decompress it first"),
    (b"\xfd7zXZ", "compressed with xz; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstandard; decompress it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7-zip archive; unpack it first"),
    (b"\x93NUMPY", "a single NumPy array, not a checkpoint"),
    (b"\x89PNG", "a PNG image, not a checkpoint"),
    (b"\xff\xd8\xff", "a JPEG image, not a checkpoint"),
    (b"%PDF", "a PDF document, not a checkpoint"),
)


class CheckpointError(UserError):
    """A checkpoint that cannot be read or converted; the message is one sentence.

    Attributes:
        kind: category for programs: "missing_file", "unreadable", "empty", "truncated",
            "damaged", "hostile", "memory", "zip_bomb", "html", "lfs_pointer", "unknown_format",
            "unsupported", "unrecognised", "missing_tensor", "unknown_tensor", "shape", "proof",
            "option".
        path: the file.
        key: the tensor or name that caused the error, if it is a single one.
        candidates: names that the user may have meant.
        details: lines beyond the sentence, such as the table of a proof that failed.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        path: str | os.PathLike[str] | None = None,
        key: str | None = None,
        candidates: tuple[str, ...] = (),
        details: str = "",
    ) -> None:
        super().__init__(message)
        self.kind, self.key, self.candidates, self.details = kind, key, candidates, details
        self.path = None if path is None else Path(path)

    def at(self, path: Path) -> CheckpointError:
        """Return the same error, with the file named if it was raised without one."""
        if self.path is not None:
            return self
        return CheckpointError(
            f"{path}: {self}", kind=self.kind, path=path, key=self.key,
            candidates=self.candidates, details=self.details,
        )  # fmt: skip


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in the `CheckpointError` of code that does not know the file."""
    try:
        yield
    except CheckpointError as error:
        raise error.at(path) from None


class RefusedError(Exception):
    """Raised by the readers of single formats; the message continues a sentence after the path."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


class TruncatedError(Exception):
    """The file ends before its content does."""


class MalformedError(pickle.UnpicklingError):
    """The content contradicts itself, such as a tensor that reaches beyond its data."""


class UnsafePickleError(Exception):
    """The file asks for something that could run code; the message is its name."""


# Exceptions that the readers raise for bad files. Any other exception is a bug of this project.
FILE_ERRORS = (
    RefusedError,
    TruncatedError,
    UnsafePickleError,
    pickle.UnpicklingError,
    EOFError,
    RecursionError,
    OSError,
)


def is_out_of_memory(error: Exception) -> bool:
    """Return True for the exceptions of Python, the system and torch when memory is used up."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in str(error)


def explain(error: Exception, path: Path, size: int, head: bytes) -> CheckpointError:
    """Turn one of `FILE_ERRORS` into a sentence.

    Args:
        size: length of the file in bytes.
        head: its first bytes.
    """

    def refusal(kind: str, what: str, key: str | None = None) -> CheckpointError:
        return CheckpointError(f"{path} {what}.", kind=kind, path=path, key=key)

    cause = " ".join(str(error).split())[:160]
    if isinstance(error, RefusedError):
        return refusal(error.kind, cause)
    if isinstance(error, UnsafePickleError):
        return refusal(
            "hostile", f"asks for {error} to be called or changed while it is read, which no "
            "checkpoint needs: nothing was executed and the file is refused; do not load it with "
            "other tools", str(error)
        )  # fmt: skip
    if isinstance(error, FileNotFoundError):
        return refusal("missing_file", "does not exist; check the path")
    if isinstance(error, IsADirectoryError):
        return refusal("missing_file", "is a directory; name a file in it")
    if isinstance(error, OSError) and error.errno is None:  # raised by open_regular
        return refusal("unreadable", "is a pipe, device or socket, not a file; save it to a file")
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: an offset below zero
        return refusal(
            "unreadable", f"cannot be read ({error.strerror or cause}); check the file and the disk"
        )
    if isinstance(error, TruncatedError | EOFError) or "truncated" in cause or "exhausted" in cause:
        return refusal("truncated", f"is truncated: it ends after {size} bytes; download it again")
    if isinstance(error, RecursionError):
        return refusal("damaged", "is nested too deeply to be a checkpoint")
    if head.isascii() and head.decode().replace("\n", "").replace("\t", "").isprintable():
        return refusal("unknown_format", "is a text file, not a checkpoint")
    return refusal("damaged", f"is damaged or not a checkpoint ({cause}); download it again")


def refuse_other_formats(head: bytes) -> None:
    """Refuse a file of another format by its first 512 bytes.

    Raises:
        RefusedError: it is one; the message names the format and what to do.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        raise RefusedError(
            "html", "is a web page (HTML or XML), not a checkpoint: the download failed; open its "
            "address in a browser to see why"
        )  # fmt: skip
    if head.startswith(b"version https://git-lfs"):
        raise RefusedError(
            "lfs_pointer", "is a Git LFS pointer, not the file itself; run `git lfs pull` in its "
            "repository"
        )  # fmt: skip
    if head[257:262] == b"ustar":
        raise RefusedError(
            "unsupported", "is a tar archive: unpack it, or, if PyTorch before 0.1.10 wrote it, "
            "load and save it with a PyTorch of that time"
        )  # fmt: skip
    for magic, what in _OTHER_FORMATS:
        if head.startswith(magic):
            raise RefusedError("unknown_format", f"is {what}")
    if text.startswith((b'{"', b"{'", b"[{")):
        raise RefusedError("unknown_format", "is a JSON file, not a checkpoint")

"""What is said of files that cannot be read: one exception, and a sentence for each kind."""

from __future__ import annotations

import os
from pathlib import Path

from moco_common.errors import UserError

# First bytes of what is often saved or downloaded in place of a checkpoint.
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
        kind: what is wrong, for programs: "missing_file", "empty", "truncated", "damaged",
            "hostile", "zip_bomb", "html", "lfs_pointer", "unknown_format", "unsupported",
            "unrecognised", "missing_tensor", "unknown_tensor", "shape", "proof", "option".
        path: the file.
        key: the tensor or name at fault, if it is a single one.
        candidates: names that could have been meant.
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


def refusal(path: Path, kind: str, what: str) -> CheckpointError:
    """``PATH WHAT.``"""
    return CheckpointError(f"{path} {what}.", kind=kind, path=path)


def truncated(path: Path, size: int) -> CheckpointError:
    """The error for a file that was cut off after ``size`` bytes."""
    return refusal(
        path, "truncated", f"is truncated: it ends after {size} bytes; download it again"
    )


def damaged(path: Path, error: Exception, head: bytes) -> CheckpointError:
    """What a parser stumbled over; of a text it is said that it is one."""
    if head.isascii() and head.decode().replace("\n", "").replace("\t", "").isprintable():
        return refusal(path, "unknown_format", "is a text, not a checkpoint")
    cause = " ".join(str(error).split())[:160]
    if not cause or isinstance(error, KeyError):  # an instruction that no pickle has
        cause = "its content makes no sense"
    return refusal(path, "damaged", f"is damaged or no checkpoint ({cause}); download it again")


def refuse_other_formats(path: Path, head: bytes) -> None:
    """Refuse what is no checkpoint by its first bytes (512 of them tell)."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        raise refusal(
            path, "html", "is a web page (HTML or XML), not a checkpoint: the download failed; "
            "open its address in a browser to see why"
        )  # fmt: skip
    if head.startswith(b"version https://git-lfs"):
        raise refusal(
            path, "lfs_pointer", "is a Git LFS pointer, not the file itself; run `git lfs pull` "
            "in its repository"
        )  # fmt: skip
    if head[257:262] == b"ustar":
        raise refusal(
            path, "unsupported", "is a tar archive: unpack it, or, if PyTorch before 0.1.10 wrote "
            "it, load and save it with a PyTorch of that time"
        )  # fmt: skip
    for magic, what in _OTHER_FORMATS:
        if head.startswith(magic):
            raise refusal(path, "unknown_format", f"is {what}")
    if text.startswith((b'{"', b"{'", b"[{")):
        raise refusal(path, "unknown_format", "is a JSON text, not a checkpoint")

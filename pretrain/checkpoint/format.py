"""Checkpoints: their schema, checksum, atomic writes, safe reads and retention.

A checkpoint is a dictionary of tensors and plain values, read as data by `moco_common.reader`, so
that nothing in it is ever executed::

    format      "moco-det/pretrain/2"
    state_dict  state of the method: encoder_q.*, encoder_k.*, queue, queue_ptr, ...; BN statistics
                are means over the ranks
    optimizer   state of the optimiser (and "scaler", that of the gradient scaler, with float16)
    step        number of completed steps; with the seed, it is the position in the data
    images      number of images in the data
    data        digests of the data: {"names": ..., "sizes": ...}; absent in earlier versions
    weights     what the run started from: {"path": ..., "sha256": ..., "source": ...,
                "encoder": ...}; absent if that was random weights
    ranks       state of each rank: {"torch": random state, "cuda": that of the device,
                "batch_norm": running statistics}, one row per rank
    config      the resolved configuration, as YAML text
    version     version of this project

The file is a zip written by ``torch.save``, which any reader of such files can read. Its seal, the
SHA-256 of everything that ``torch.save`` wrote, is the comment of the zip.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO, Any, cast

import torch

from moco_common.errors import UserError
from moco_common.files import link_file, open_regular, replace_file
from moco_common.reader.errors import CheckpointError
from moco_common.reader.formats import Discarded, read_checkpoint

FORMAT = "moco-det/pretrain/2"
LAST = "checkpoint_last.pth"
_MARK = b"sha256:"
# Kinds of unreadable files that an earlier checkpoint would not remedy.
NOT_DAMAGED = ("missing_file", "unreadable", "hostile", "memory")
# Parts that a run needs to be resumed; a method that reads another kind of state says so itself.
_PARTS = {
    "config": str,
    "state_dict": dict,
    "optimizer": dict,
    "step": int,
    "images": int,
    "ranks": dict,
}
_SEAL = 2 + len(_MARK) + 64  # bytes: length of the comment, mark, hexadecimal digest


class DamagedError(UserError):
    """The file is not as it was written; an earlier checkpoint may be intact."""


def save(checkpoint: dict[str, Any], folder: str | os.PathLike[str], keep: int = 2) -> Path:
    """Write ``checkpoint_<step>.pth`` atomically, link `LAST` to it, and keep the newest ``keep``.

    A reader finds either the old file or the whole new one, even if this process is killed.
    Checkpoints of later steps (of a run that was set back) are kept.

    Raises:
        UserError: the disk is full. Earlier checkpoints are intact.
        OSError: the file cannot be written for another reason.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint_{checkpoint['step']:08d}.pth"
    replace_file(path, lambda file: _write_sealed(checkpoint, file))
    link_file(path, folder / LAST)
    older = [old for old in sorted(folder.glob("checkpoint_[0-9]*.pth")) if old.name <= path.name]
    for old in older[:-keep]:
        old.unlink()
    return path


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of this project into memory, on the CPU.

    Raises:
        DamagedError: truncated, or changed.
        UserError: missing, not one of this project, or with more than tensors and plain values.
    """
    try:
        sealed = _check_seal(path)
        checkpoint = read_checkpoint(path, copy=True, checksums=not sealed)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check file and disk.") from None
    except CheckpointError as error:
        if error.kind in NOT_DAMAGED:
            raise UserError(f"The checkpoint was not read: {error}") from None
        reason = "" if error.kind == "damaged" else f" ({error.kind.replace('_', ' ')})"
        raise DamagedError(
            f"{path} is damaged{reason} and was not read: use an earlier checkpoint."
        ) from None
    if (name := _discarded(checkpoint)) is not None:
        raise UserError(
            f"{path} contains more than tensors and plain values ({name}) and was not read: it was "
            f"not written by this project; remove it."
        )
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a pre-training checkpoint of this project (format {FORMAT}): use one "
            f"that tools/pretrain.py wrote."
        )
    if not sealed:
        raise DamagedError(f"{path} has lost its checksum: use an earlier checkpoint.")
    return checkpoint


def load_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`load`, and check that every part has its type, for whoever needs more than the weights.

    Raises:
        UserError: a part is missing or of another type; the message names it.
    """
    checkpoint = load(path)
    if (part := _malformed(checkpoint)) is not None:
        raise UserError(
            f"{path} is not as tools/pretrain.py writes it ({part!r} is missing or not of its "
            f"kind): use another checkpoint."
        )
    return checkpoint


def _malformed(checkpoint: dict[str, Any]) -> str | None:
    """Return the first part that is missing or of another type or range."""
    for part, kind in _PARTS.items():
        if type(checkpoint.get(part)) is not kind:
            return part
    for part, least in (("step", 0), ("images", 1)):
        if not least <= checkpoint[part] < 1 << 48:
            return part
    ranks = checkpoint["ranks"]
    tables = all(isinstance(rows, torch.Tensor) and rows.dim() == 2 for rows in ranks.values())
    if not tables or "torch" not in ranks or len(set(map(len, ranks.values()))) != 1:
        return "ranks"
    optional: tuple[tuple[str, type], ...] = (("data", dict), ("weights", dict), ("version", str))
    present = ((part, kind) for part, kind in optional if part in checkpoint)
    return next((part for part, kind in present if not isinstance(checkpoint[part], kind)), None)


def _discarded(node: Any) -> str | None:
    """Return the class of the first object that is neither a tensor nor a plain value."""
    if isinstance(node, Discarded):
        return node.name
    if isinstance(node, dict | list | tuple):
        parts = node.values() if isinstance(node, dict) else node
        return next((name for part in parts if (name := _discarded(part)) is not None), None)
    return None


def candidates(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints of a run in the order to try them: `LAST`, then newest first."""
    folder = Path(folder)
    numbered = sorted(folder.glob("checkpoint_[0-9]*.pth"), reverse=True)
    last = folder / LAST
    if not last.exists():
        return numbered
    return [last, *(path for path in numbered if not path.samefile(last))]


class _Hashed:
    """A file that computes the SHA-256 of what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: memoryview) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write_sealed(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    sink = _Hashed(file)
    torch.save(checkpoint, cast(IO[bytes], sink))
    # The last two bytes of a zip without a comment are the length of the comment, 0.
    seal = _MARK + sink.hash.hexdigest().encode()
    file.seek(-2, os.SEEK_END)
    file.write(len(seal).to_bytes(2, "little") + seal)


def _check_seal(path: str | os.PathLike[str]) -> bool:
    """Return True if the file has a seal.

    Raises:
        DamagedError: the seal does not match the file.
    """
    with open_regular(path, most=None) as file:
        size = file.seek(0, os.SEEK_END)
        if size < _SEAL:
            return False
        file.seek(-_SEAL, os.SEEK_END)
        seal = file.read()
        if not seal[2:].startswith(_MARK):
            return False
        digest, left = hashlib.sha256(), size - _SEAL
        file.seek(0)
        while left:
            chunk = file.read(min(left, 1 << 20))
            if not chunk:  # truncated just now
                return False
            digest.update(chunk)
            left -= len(chunk)
    digest.update(b"\0\0")
    if seal != (_SEAL - 2).to_bytes(2, "little") + _MARK + digest.hexdigest().encode():
        raise DamagedError(
            f"{path} is damaged (its bytes differ from its checksum): use an earlier checkpoint."
        )
    return True

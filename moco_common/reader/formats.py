"""Reading checkpoint files as data: PyTorch (zip and legacy), pickle, safetensors.

Nothing that a file says is executed, no class that it names is imported (see reader_pickle.py).
Tensors of zip and safetensors files are mapped, not read: only what is used costs memory.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moco_common.reader.errors import (
    CheckpointError,
    damaged,
    refusal,
    refuse_other_formats,
    truncated,
)
from moco_common.reader.unpickler import (
    DataUnpickler,
    Discarded,
    Storage,
    UnsafePickleError,
    resolve,
)

__all__ = ["CheckpointError", "Discarded", "read_checkpoint"]
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file of torch.save before 1.6
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read any checkpoint file as nested dictionaries and lists of tensors and plain values.

    Args:
        path: a file of ``torch.save`` (any version, whole pickled modules too), a pickle
            (Detectron2's .pkl), or safetensors. Recognised by content, not by name.

    Returns:
        The file's own structure. NumPy arrays come as tensors, modules as dictionaries of their
        tensors, any other object as :class:`Discarded`. Tensors may be mapped from the file
        (privately: changing them does not change it): clone what outlives it. The string
        metadata of a safetensors file is under the key "__metadata__".

    Raises:
        CheckpointError: missing, empty, truncated, damaged, hostile, or no checkpoint at all.
    """
    path = Path(path)
    if path.is_dir():
        raise refusal(path, "missing_file", "is a directory; name a file in it")
    if not path.is_file():
        raise refusal(path, "missing_file", "does not exist; check the path")
    size = path.stat().st_size
    if size == 0:
        raise refusal(path, "empty", "is empty (0 bytes); download or save it again")
    with path.open("rb") as file:
        head = file.read(512)
        refuse_other_formats(path, head)
        file.seek(0)
        try:
            if head.startswith(b"PK"):
                return _read_zip(path, file, size)
            if len(head) > 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 32:
                return _read_safetensors(path, file, size)
            return _read_pickle(path, file, size)
        except UnsafePickleError as error:
            raise CheckpointError(
                f"{path} asks for {error} to be called while it is read, which no checkpoint has "
                "a reason to do: nothing was executed and the file is refused; do not load it "
                "with other tools.",
                kind="hostile",
                path=path,
                key=str(error),
            ) from None
        except EOFError:
            raise truncated(path, size) from None
        except pickle.UnpicklingError as error:
            if "truncated" in str(error) or "exhausted" in str(error):
                raise truncated(path, size) from None
            raise damaged(path, error, head) from None
        except RecursionError:
            raise refusal(path, "damaged", "is nested too deeply to be a checkpoint") from None
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            AssertionError,
            RuntimeError,
            OSError,
            OverflowError,
            MemoryError,
            NotImplementedError,
            ImportError,
            struct.error,
            zipfile.BadZipFile,
        ) as error:
            raise damaged(path, error, head) from None


def _map(path: Path, size: int) -> Tensor:
    """The file as a private (copy-on-write) 1-D uint8 tensor; pages are read when touched."""
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]


def _read_zip(path: Path, file: BinaryIO, size: int) -> Any:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise truncated(path, size) from None
    entries = {info.filename: info for info in archive.infolist()}
    root = next((n[: -len("data.pkl")] for n in entries if n.endswith("data.pkl")), None)
    if f"{root}constants.pkl" in entries:
        raise refusal(
            path, "unsupported", "is a TorchScript program, not a checkpoint: load it with "
            "torch.jit.load and save its state_dict() with torch.save"
        )  # fmt: skip
    if any(e.compress_type != zipfile.ZIP_STORED or e.file_size > size for e in entries.values()):
        total = sum(e.file_size for e in entries.values())
        raise refusal(
            path, "zip_bomb", f"is a compressed zip of {size} bytes that claims {total}, which "
            "torch.save never writes (a zip bomb?): it was not unpacked; save it with torch.save"
        )  # fmt: skip
    if root is None:
        kind = "a NumPy archive (.npz)" if any(n.endswith(".npy") for n in entries) else "a zip"
        raise refusal(path, "unknown_format", f"is {kind} without data.pkl, not a checkpoint")

    def begin(entry: zipfile.ZipInfo) -> int:
        file.seek(entry.header_offset + 26)  # local header: lengths of name and extra field
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        return int(entry.header_offset + 30 + name_length + extra_length)

    def content(name: str) -> bytes:
        entry = entries[name]
        file.seek(_checked(file, entry, begin(entry)))
        return file.read(entry.file_size)

    if f"{root}byteorder" in entries and content(f"{root}byteorder") != b"little":
        raise refusal(path, "unsupported", "was saved on a big-endian machine; save it on this one")
    data = _map(path, size)
    storages: dict[str, Storage] = {}

    def storage(identifier: tuple[Any, ...]) -> Storage:
        _, dtype, key, _, numel = identifier[:5]
        if key not in storages:
            entry = entries[f"{root}data/{key}"]
            start = _checked(file, entry, begin(entry))
            storages[key] = Storage(dtype, numel, data[start : start + entry.file_size])
        return storages[key]

    return resolve(DataUnpickler(io.BytesIO(content(f"{root}data.pkl")), storage).load())


def _checked(file: BinaryIO, entry: zipfile.ZipInfo, start: int) -> int:
    """``start``, if the bytes from there on are those that were written.

    PyTorch's own reader does not look. Read in pieces, not through the map: what is only checked
    costs no memory. A sum of 0 was not computed (torch.serialization.set_crc32_options).
    """
    file.seek(start)
    left, crc = entry.file_size if entry.CRC else 0, 0
    while left and (piece := file.read(min(left, 1 << 20))):
        left, crc = left - len(piece), zlib.crc32(piece, crc)
    if crc != entry.CRC:
        raise ValueError(f"the bytes of {entry.filename} are not those that were written (CRC)")
    return start


def _read_safetensors(path: Path, file: BinaryIO, size: int) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", file.read(8))
    if 8 + length > size:
        raise truncated(path, size)
    header = json.loads(file.read(length))
    data = _map(path, size)[8 + length :]
    tree: dict[str, Any] = {"__metadata__": header.pop("__metadata__", {})}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if end > data.numel():
            raise truncated(path, size)
        dtype = _SAFETENSORS.get(entry["dtype"])
        if dtype is None:
            tree[name] = Discarded(f"tensor of {entry['dtype']}")
            continue
        shape = entry["shape"]
        if math.prod(shape) * dtype.itemsize != end - start or start < 0:
            raise ValueError(f"{name} does not fill its shape")
        tree[name] = Storage(dtype, math.prod(shape), data[start:end]).view(dtype).view(shape)
    return tree


def _read_pickle(path: Path, file: BinaryIO, size: int) -> Any:
    """A plain pickle, or PyTorch's legacy format: four pickles, then the storages' bytes."""
    first = DataUnpickler(file, nested=_nested).load()
    if first != _LEGACY_MAGIC or isinstance(first, bool):
        if isinstance(first, (int, float, str, bytes)) or first is None:
            raise refusal(path, "unknown_format", "is no checkpoint: it holds no tensors")
        return resolve(first)
    return resolve(_load_legacy(file, size))


def _nested(content: bytes) -> Any:
    """A tensor that was pickled with ``pickle.dump`` carries a whole legacy file in bytes."""
    file = io.BytesIO(content)
    if DataUnpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("a pickled tensor without PyTorch's mark")
    return _load_legacy(file, len(content))


def _load_legacy(file: BinaryIO, size: int) -> Any:
    for _ in ("protocol version", "system"):
        DataUnpickler(file).load()
    storages: dict[str, Storage] = {}

    def storage(identifier: tuple[Any, ...]) -> Storage:
        _, dtype, key, _, numel = identifier[:5]
        if identifier[5:] and identifier[5] is not None:
            raise ValueError("views of storages, written by PyTorch before 0.4")
        return storages.setdefault(str(key), Storage(dtype, numel))

    tree = DataUnpickler(file, storage).load()
    for key in DataUnpickler(file).load():
        known = storages[str(key)]
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != known.numel:
            raise ValueError(f"a storage of {numel} elements, {known.numel} expected")
        if known.nbytes > size - file.tell():
            raise EOFError
        content = bytearray(file.read(known.nbytes))
        known.data = (
            torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()
        )
    return tree

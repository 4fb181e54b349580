"""Reading of checkpoint files as data: PyTorch (zip and legacy), pickle, safetensors.

Nothing that a file asks for is executed, and no class that it names is imported (see unpickler.py).
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moco_common.files import open_regular
from moco_common.reader.errors import (
    FILE_ERRORS,
    CheckpointError,
    MalformedError,
    RefusedError,
    TruncatedError,
    explain,
    is_out_of_memory,
    refuse_other_formats,
)
from moco_common.reader.records import Discarded, Storage, resolve
from moco_common.reader.unpickler import Allowance, BoundedFile, DataUnpickler

__all__ = ["CheckpointError", "Discarded", "read_checkpoint"]
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file of torch.save before 1.6


@dataclass(frozen=True)
class _Source:
    """An open file, and how to read its tensors."""

    path: Path
    file: BinaryIO
    size: int
    copy: bool
    checksums: bool


def read_checkpoint(
    path: str | os.PathLike[str], *, copy: bool = False, checksums: bool = True
) -> Any:
    """Read any checkpoint file as nested dictionaries and lists of tensors and plain values.

    Args:
        path: a file of ``torch.save`` (any version, whole pickled modules too), a pickle
            (Detectron2's .pkl), or safetensors. Recognised by content, not by name.
        copy: read tensors into memory. By default those of zip and safetensors files are mapped:
            only what is used costs memory, and what outlives the file must be cloned. The mapping
            is private: changing a tensor does not change the file.
        checksums: verify the CRC of every tensor of a zip file, which PyTorch's own reader does
            not do. Turn it off where the whole file has been verified already.

    Returns:
        The file's own structure. NumPy arrays become tensors, modules become dictionaries of their
        tensors, sets become lists, and any other object becomes `Discarded`. The metadata of a
        safetensors file (strings) are under "__metadata__".

    Raises:
        CheckpointError: the file is missing, empty, truncated, damaged, hostile, too large for the
            memory, or not a checkpoint.
    """
    path, size, head = Path(path), 0, b""
    try:
        with open_regular(path, most=None) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise RefusedError("empty", "is empty (0 bytes); download or save it again")
            head = file.read(512)
            file.seek(0)
            return _format_of(head)(_Source(path, file, size, copy, checksums))
    except (*FILE_ERRORS, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise CheckpointError(
                f"{path} ({size / 1e9:.1f} GB) needs more memory than is free; close other "
                "programs or use a machine with more memory.", kind="memory", path=path
            ) from None  # fmt: skip
        if not isinstance(error, FILE_ERRORS):
            raise
        raise explain(error, path, size, head) from None


def _format_of(head: bytes) -> Callable[[_Source], Any]:
    """Return the reader for a file that begins with these bytes."""
    refuse_other_formats(head)
    if head.startswith(b"PK"):
        return _read_zip
    if len(head) > 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 32:
        return _read_safetensors
    return _read_pickle


def _read_zip(source: _Source) -> Any:
    entries = _entries(source)
    root = next((n[: -len("data.pkl")] for n in entries if n.endswith("data.pkl")), None)
    if f"{root}constants.pkl" in entries or any(n.startswith(f"{root}code/") for n in entries):
        raise RefusedError(
            "unsupported", "is a TorchScript program, not a checkpoint: load it with "
            "torch.jit.load and save its state_dict() with torch.save"
        )  # fmt: skip
    total = sum(entry.file_size for entry in entries.values())
    if total > source.size or any(e.compress_type != zipfile.ZIP_STORED for e in entries.values()):
        raise RefusedError(
            "zip_bomb", f"is a zip of {source.size} bytes, compressed or overlapping, that claims "
            f"{total}, which torch.save never writes (a zip bomb?): it was not unpacked; save it "
            "with torch.save"
        )  # fmt: skip
    if root is None:
        kind = "a NumPy archive (.npz)" if any(n.endswith(".npy") for n in entries) else "a zip"
        raise RefusedError("unknown_format", f"is {kind} without data.pkl, not a checkpoint")

    def start(name: str) -> int:
        """Return the offset of an entry's bytes, after verifying them."""
        if name not in entries:
            raise MalformedError(f"it has no entry {name}")
        entry = entries[name]
        source.file.seek(entry.header_offset + 26)  # local header: lengths of name and extra field
        lengths = source.file.read(4)
        if len(lengths) < 4:
            raise MalformedError(f"{entry.filename} lies outside the file")
        begin = int(entry.header_offset + 30 + sum(struct.unpack("<HH", lengths)))
        if source.checksums:
            _verify(source.file, entry, begin)
        return begin

    def content(name: str) -> bytes:
        source.file.seek(start(name))
        return source.file.read(entries[name].file_size)

    if f"{root}byteorder" in entries and content(f"{root}byteorder") != b"little":
        raise RefusedError("unsupported", "was saved on a big-endian machine; save it on this one")
    data = None if source.copy else _map(source)
    storages: dict[str, Storage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        if key not in storages:
            name = f"{root}data/{key}"
            begin = start(name)
            end = begin + entries[name].file_size
            if end > source.size:
                raise MalformedError(f"{name} lies outside the file")
            if data is None:
                source.file.seek(begin)
                content = read_tensor(source.file, end - begin)
            else:
                content = data[begin:end]
            storages[key] = Storage(dtype, numel, content)
        return storages[key]

    allowance = Allowance(source.size)
    pickled = content(f"{root}data.pkl")
    pickled_file = BoundedFile(io.BytesIO(pickled), len(pickled))
    return resolve(DataUnpickler(pickled_file, allowance, storage=storage).load())


def _entries(source: _Source) -> dict[str, zipfile.ZipInfo]:
    try:
        archive = zipfile.ZipFile(source.file)
    except zipfile.BadZipFile:
        raise TruncatedError from None
    except (ValueError, NotImplementedError, struct.error) as error:
        raise MalformedError(f"its table of contents is inconsistent: {error}") from None
    return {info.filename: info for info in archive.infolist()}


def _verify(file: BinaryIO, entry: zipfile.ZipInfo, start: int) -> None:
    """Compare the bytes from ``start`` on with the CRC of the entry.

    They are read in pieces, not through the map, so that verification costs no memory. A CRC of 0
    was not computed (torch.serialization.set_crc32_options).
    """
    file.seek(start)
    left, crc = entry.file_size if entry.CRC else 0, 0
    while left and (piece := file.read(min(left, 1 << 20))):
        left, crc = left - len(piece), zlib.crc32(piece, crc)
    if crc != entry.CRC:
        raise MalformedError(f"the bytes of {entry.filename} are not those that were written (CRC)")


def _map(source: _Source) -> Tensor:
    """Map the file as a private (copy-on-write) 1-D uint8 tensor; pages are read when accessed."""
    storage = torch.UntypedStorage.from_file(str(source.path), False, source.size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]


def read_tensor(file: BinaryIO, size: int) -> Tensor:
    """Read ``size`` bytes into a new 1-D uint8 tensor; the caller has checked that they exist."""
    data = torch.empty(size, dtype=torch.uint8)
    view, done = memoryview(data.numpy().data), 0
    while done < size:
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise TruncatedError
        done += count
    return data


def _read_safetensors(source: _Source) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise RefusedError(
            "unsupported", "is in the format safetensors, which needs its library: "
            "pip install 'moco-det[safetensors]'"
        ) from None  # fmt: skip
    (length,) = struct.unpack("<Q", source.file.read(8))
    if 8 + length > source.size:
        raise TruncatedError
    tree: dict[str, Any] = {}
    try:
        with safe_open(source.path, framework="pt") as archive:
            tree["__metadata__"] = archive.metadata() or {}
            for name in archive.keys():  # noqa: SIM118 (not a mapping)
                tensor = archive.get_tensor(name)
                tree[name] = tensor.clone() if source.copy else tensor
    except SafetensorError as error:
        if "incomplete" in str(error).lower():
            raise RefusedError(
                "truncated", "is truncated, or longer than its header says; download it again"
            ) from None  # fmt: skip
        raise MalformedError(str(error)) from None
    return tree


def _read_pickle(source: _Source) -> Any:
    """Read a plain pickle, or PyTorch's legacy format: four pickles, then the storages' bytes."""
    file, allowance = BoundedFile(source.file, source.size), Allowance(source.size)
    first = DataUnpickler(file, allowance, nested=_read_nested).load()
    if first == _LEGACY_MAGIC and isinstance(first, int):
        return resolve(_read_legacy(file, allowance))
    if first is None or isinstance(first, (int, float, str, bytes)):
        raise RefusedError("unknown_format", "is not a checkpoint: it holds no tensors")
    return resolve(first)


def _read_nested(content: bytes, allowance: Allowance) -> Any:
    """Read a tensor pickled by ``pickle.dump``, which is a whole legacy file in bytes."""
    file = BoundedFile(io.BytesIO(content), len(content))
    if DataUnpickler(file, allowance).load() != _LEGACY_MAGIC:
        raise MalformedError("a pickled tensor without PyTorch's mark")
    return _read_legacy(file, allowance)


def _read_legacy(file: BoundedFile, allowance: Allowance) -> Any:
    for _ in ("protocol version", "system"):
        DataUnpickler(file, allowance).load()
    storages: dict[str, Storage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, numel))

    tree = DataUnpickler(file, allowance, storage=storage).load()
    keys = DataUnpickler(file, allowance).load()
    if not isinstance(keys, list) or not set(map(type, keys)) <= {str, int}:
        raise MalformedError("its list of storages is malformed")
    for key in keys:
        known = storages.get(str(key))
        if known is None:
            raise MalformedError("a storage that no tensor uses")
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != known.numel:
            raise MalformedError(f"a storage of {numel} elements, {known.numel} expected")
        known.data = read_tensor(file.file, file.check(known.nbytes))
    return tree

"""Reading and writing of weight files in the formats of Detectron2 and torchvision."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco_common.backbone.pixel_settings import own_metadata
from moco_common.files import replace_file
from moco_common.reader.errors import CheckpointError
from moco_common.reader.formats import read_checkpoint

_SAFETENSORS = {torch.float32: "F32", torch.int64: "I64"}
_AUTHORS = {"moco-det": "MOCO", "MoCo": "MOCO"}  # as MoCo's own converter writes it


class Weights(NamedTuple):
    """A Detectron2 weight file.

    Attributes:
        tensors: the tensors by their names in the file.
        metadata: metadata of a file that this project converted, else None.
        author: the file's ``__author__``; "Caffe2" for files of the original Detectron.
        matching_heuristics: whether Detectron2 matches the names by their suffixes.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] | None
    author: str | None = None
    matching_heuristics: bool = False


def load_detectron2_weights(path: str | os.PathLike[str]) -> Weights:
    """Read weights in Detectron2's naming scheme, without executing code.

    Args:
        path: a converted file (this project's or MoCo's), or a .pkl or .pth of Detectron2.

    Raises:
        CheckpointError: the file cannot be read, or its names are not Detectron2's.
    """
    tree = read_checkpoint(path)
    metadata, author, heuristics, model = None, None, False, tree
    if isinstance(tree, dict):
        metadata, author = own_metadata(tree), tree.get("__author__")
        heuristics = tree.get("matching_heuristics") is True
        if isinstance(tree.get("model"), dict):
            model = tree["model"]
        elif "__author__" not in tree and any("branch2a" in str(name) for name in tree):
            author, heuristics = "Caffe2", True
        elif isinstance(tree.get("blobs"), dict):
            model, author, heuristics = tree["blobs"], "Caffe2", True
    tensors = (
        {
            name: value
            for name, value in model.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        if isinstance(model, dict)
        else {}
    )
    if author == "Caffe2":
        tensors = {name: t for name, t in tensors.items() if not name.endswith("_momentum")}
    if not any("res2" in name for name in tensors):
        raise CheckpointError(
            f"{path} holds no weights with Detectron2's names (res2.0.conv1.weight, ...): convert "
            "it first with tools/convert.py.",
            kind="unrecognised",
            path=path,
        )
    return Weights(
        tensors,
        metadata,
        author if isinstance(author, str) else None,
        heuristics,
    )


def version() -> str:
    """Return the version of this project; "unknown" if it is not installed."""
    try:
        return importlib.metadata.version("moco-det")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    to: str,
    check: Callable[[Path], object],
) -> None:
    """Write a converted file atomically, after ``check`` has passed on the temporary file.

    Args:
        path: file to write; its suffix selects the format: .pkl, .pth (or .pt), .safetensors.
        to: "detectron2" (wrapped as its loader expects) or "torchvision" (a state dict).
        check: called with the temporary file before it is renamed; may raise.

    Raises:
        CheckpointError: the suffix is not one of the target's.
    """
    writer = writer_for(path, to)
    replace_file(path, lambda file: writer(file, tensors, metadata), check)


def writer_for(
    path: Path, to: str
) -> Callable[[IO[bytes], Mapping[str, Tensor], Mapping[str, Any]], None]:
    """Return the writer for a file's suffix.

    Raises:
        CheckpointError: the suffix is not one of the target's.
    """
    writers = {
        ("detectron2", ".pkl"): _write_pickle,
        ("detectron2", ".pth"): _write_torch,
        ("torchvision", ".pth"): _write_state_dict,
        ("detectron2", ".safetensors"): _write_safetensors,
        ("torchvision", ".safetensors"): _write_safetensors,
    }
    suffix = ".pth" if path.suffix == ".pt" else path.suffix
    if (to, suffix) not in writers:
        known = ", ".join(s for target, s in writers if target == to)
        raise CheckpointError(
            f"-o {path}: the suffix for {to} weights must be one of {known}.",
            kind="option",
            path=path,
        )
    return writers[to, suffix]


def _wrapped(model: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": dict(model),
        "__author__": _AUTHORS.get(metadata["source"], metadata["source"]),
        "matching_heuristics": True,
        "metadata": dict(metadata),
    }


class _PortablePickler(pickle.Pickler):
    """Pickler that stores arrays as calls of ``numpy.ndarray``: NumPy 1 cannot read NumPy 2's."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def _write_pickle(file: IO[bytes], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    # Protocol 5 stores a bytearray directly; reading older ones needs twice the memory.
    _PortablePickler(file, protocol=5).dump(_wrapped(arrays, meta))


def _write_torch(file: IO[bytes], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    torch.save(_wrapped(tensors, meta), file)


def _write_state_dict(
    file: IO[bytes], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write a state dict that loads with ``strict=True``, with the metadata as an attribute."""
    state = OrderedDict(tensors)
    # torch keeps versions of modules here, by prefix; no module has this prefix.
    state._metadata = {"moco-det": dict(meta)}  # type: ignore[attr-defined]
    torch.save(state, file)


def _write_safetensors(
    file: IO[bytes], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    own = json.dumps(dict(meta))
    header: dict[str, Any] = {"__metadata__": {"moco-det": own, "format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # align the data
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(tensor.numpy().tobytes())

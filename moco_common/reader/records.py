"""Plain records of the objects in a pickle, and their conversion to tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco_common.reader.errors import MalformedError


class Discarded:
    """Placeholder for an object of the file that is not data.

    Attributes:
        name: its class.
        values: attributes of a namespace, in which scripts save their arguments; else empty.
    """

    __slots__ = ("name", "values")

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"<discarded {self.name}>"


class StandIn:
    """Base of the classes that replace unknown ones; keeps its state, for pickled modules."""

    path = "object"
    state: Any = None

    def __init__(self, *args: Any) -> None: ...

    def __call__(self, *args: Any) -> StandIn:
        return StandIn()

    def set_state(self, state: Any) -> None:
        """Keep the attributes, without those that are slots."""
        self.state = state[0] if isinstance(state, tuple) and len(state) == 2 else state


class Mapping(dict[Any, Any]):
    """A dictionary of any class, as a plain one; of its attributes only ``metadata`` is kept."""

    metadata: Any = None

    def put(self, items: list[Any]) -> None:
        """Add ``[key, value, key, value, ...]``.

        Keys that are not plain values are replaced by the name of their type, because hashing a
        nested tuple may take forever.
        """
        for key, value in zip(items[::2], items[1::2], strict=False):
            plain = key is None or isinstance(key, (str, int, float, bytes))
            text = key.decode("latin1") if isinstance(key, bytes) else key
            self[text if plain else repr(type(key).__name__)] = value

    def set_state(self, state: Any) -> None:
        """Keep ``_metadata``, which state dicts have."""
        if isinstance(state, dict):
            self.metadata = state.get("_metadata")


class Storage:
    """The bytes of tensors, as a 1-D uint8 tensor that may be filled in later."""

    def __init__(self, dtype: torch.dtype, numel: int, data: Tensor | None = None) -> None:
        self.dtype, self.numel, self.data = dtype, numel, data

    @property
    def nbytes(self) -> int:
        """Number of bytes of all elements."""
        return self.numel * self.dtype.itemsize

    def view(self, dtype: torch.dtype) -> Tensor:
        """Return the elements, flat; copied, once, only if they are not aligned in the file."""
        if self.data is None or self.data.numel() < self.nbytes:
            raise MalformedError("a tensor's data is shorter than its declared size")
        if self.data.storage_offset() % max(16, dtype.itemsize):
            self.data = self.data.clone()
        return self.data[: self.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)


# Dtypes that torch computes with; most operations on others (quantised, bits) are errors.
_NUMBERS = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(getattr(torch, f"uint{bits}") for bits in (16, 32, 64) if hasattr(torch, f"uint{bits}")),
}


class TensorRecipe:
    """The arguments of a tensor, whose storage may follow later in the file."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride
        self.dtype: torch.dtype | None = None

    def set_state(self, state: Any) -> None:
        """Ignore the attributes of a tensor, which are not data."""

    def build(self) -> Tensor | Discarded:
        """Return the tensor, a view of its storage."""
        if not isinstance(self.storage, Storage):
            raise MalformedError("a tensor without a storage")
        size, stride, (offset,) = _ints(self.size), _ints(self.stride), _ints((self.offset,))
        if len(size) != len(stride):
            raise MalformedError("a tensor with more sizes than strides, or fewer")
        if math.prod(size) > self.storage.numel:  # expanded: a few bytes could stand for terabytes
            return Discarded("expanded tensor")
        dtype = self.dtype or self.storage.dtype
        if dtype not in _NUMBERS:
            return Discarded(f"tensor of {dtype}")
        flat = self.storage.view(dtype)
        if 0 in size:
            return flat.new_empty(0).view(size) if max(size) < 1 << 31 else Discarded("empty")
        if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(flat):
            raise MalformedError("a tensor reaches beyond its data")
        return flat.as_strided(size, stride, flat.storage_offset() + offset)


_DTYPES = frozenset("f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1 c8 c16".split())  # noqa: SIM905


class DType:
    """``numpy.dtype``; only numbers and booleans are supported."""

    def __init__(self, code: Any = "", *flags: Any) -> None:
        self.code = code.lstrip("|") if isinstance(code, str) else ""

    def set_state(self, state: Any) -> None:
        """Take the byte order."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "="):
            self.code = state[1] + self.code.lstrip("<>=")

    def numpy(self) -> np.dtype[Any] | None:
        """Return the dtype itself; None if it is not supported."""
        return np.dtype(self.code) if self.code.lstrip("<>=") in _DTYPES else None


class ArrayRecipe:
    """``numpy.ndarray``: created empty and filled by its state, or created from a buffer."""

    def __init__(self, shape: Any = (), dtype: Any = "", data: Any = None, *more: Any) -> None:
        known = dtype if isinstance(dtype, DType) else DType(dtype)
        self.state: tuple[Any, ...] = (shape, known, False, data)

    def set_state(self, state: Any) -> None:
        """Take (version,) shape, dtype, is_fortran, data."""
        if not isinstance(state, tuple) or len(state) < 4:
            raise MalformedError("an array without shape, type or data")
        self.state = state[-4:]

    def build(self) -> Tensor | np.ndarray[Any, Any] | Discarded:
        """Return the array as a tensor if torch has its dtype, else as a NumPy array."""
        shape, dtype, fortran, data = self.state
        self.state = ()  # built only once, so that the bytes are freed when they are copied
        known = dtype.numpy() if isinstance(dtype, DType) else None
        if known is None or not isinstance(data, (bytes, bytearray, str)):
            code = dtype.code if isinstance(dtype, DType) else ""
            return Discarded(f"numpy array of {code!r}")
        raw = latin1(data) if isinstance(data, str) else data
        raw = raw if isinstance(raw, bytearray) else bytearray(raw)  # a tensor is writable
        size = _ints(shape if isinstance(shape, (tuple, list)) else (shape,))
        if math.prod(size) * known.itemsize != len(raw):
            raise MalformedError("an array's data does not fill its shape")
        array = np.frombuffer(raw, known).reshape(size, order="F" if fortran is True else "C")
        array = array.astype(known.newbyteorder("="), copy=False)
        try:
            return torch.from_numpy(array)
        except TypeError:  # unsigned 16 to 64 bits, on older versions of torch
            return array


def _ints(values: Any) -> tuple[int, ...]:
    """Check sizes, strides or offsets: up to 32 integers that are not negative."""
    if not isinstance(values, (tuple, list)) or len(values) > 32:
        raise MalformedError("the shape of a tensor is malformed")
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise MalformedError("the shape of a tensor is malformed")
    return tuple(values)


def latin1(text: str) -> bytes:
    """Return the bytes that protocols below 3 wrote as text."""
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise MalformedError("text that stands for bytes holds other characters") from None


_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")  # a script's arguments


def resolve(tree: Any) -> Any:
    """Build the tensors in the tree that the unpickler returned; stand-ins become `Discarded`.

    A pickled module (``torch.save(model)``) becomes the nested dictionary of its tensors. Shared
    parts stay shared, so that a small file cannot expand into a large tree.

    Raises:
        MalformedError: a tensor or an array contradicts itself.
        RecursionError: the tree is nested too deeply.
    """
    return _resolve(tree, {})


def _resolve(node: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    if node is None or isinstance(node, (bool, int, float, complex, str, Discarded, torch.dtype)):
        return node
    if id(node) in done:
        return done[id(node)][1]
    result: Any
    if isinstance(node, (TensorRecipe, ArrayRecipe)):
        result = node.build()
    elif isinstance(node, Mapping):
        result = {}
        done[id(node)] = (node, result)  # before its parts: it may contain itself
        result.update((key, _resolve(value, done)) for key, value in node.items())
        if isinstance(node.metadata, dict):
            own = _resolve(node.metadata.get("moco-det"), done)  # written by this project
            if isinstance(own, dict):
                result["metadata"] = own
    elif isinstance(node, list):
        result = []
        done[id(node)] = (node, result)
        result.extend(_resolve(value, done) for value in node)
    elif isinstance(node, tuple):
        result = tuple(_resolve(value, done) for value in node)
    elif isinstance(node, (bytes, bytearray)):
        result = bytes(node)
    elif isinstance(node, StandIn):
        module = _module(node, done)
        result = Discarded(node.path) if module is None else module
        if node.path in _NAMESPACES and module is None and isinstance(node.state, dict):
            done[id(node)] = (node, result)
            result.values = _resolve(node.state, done)
    else:
        stand_in = isinstance(node, type) and issubclass(node, StandIn)
        result = Discarded(node.path if stand_in else type(node).__name__)
    done[id(node)] = (node, result)  # keeps the node alive, so that its id stays unique
    return result


def _module(node: StandIn, done: dict[int, tuple[Any, Any]]) -> dict[str, Any] | None:
    """Return the tensors of a pickled ``nn.Module``, nested like its submodules; else None."""
    state = node.state
    if not isinstance(state, dict) or not isinstance(state.get("_parameters"), dict):
        return None
    result: dict[str, Any] = {}
    done[id(node)] = (node, result)
    for part in ("_parameters", "_buffers", "_modules"):
        members = state.get(part)
        if isinstance(members, dict):
            result.update((name, _resolve(value, done)) for name, value in members.items())
    return result

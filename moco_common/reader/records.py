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
MAX_REPEATED = 1_000_000  # values of a tree that are shared with another place in it
_OPEN = object()


def resolve(tree: Any) -> Any:
    """Build the tensors in the tree that the unpickler returned; stand-ins become `Discarded`.

    A pickled module (``torch.save(model)``) becomes the nested dictionary of its tensors. Shared
    parts stay shared, and a part of itself becomes `Discarded`, so that whoever walks the result
    comes to an end.

    Raises:
        MalformedError: a tensor or an array contradicts itself, or shared parts occur so often
            that a small file would expand into a large tree.
        RecursionError: the tree is nested too deeply.
    """
    return _Resolver().resolve(tree)


class _Resolver:
    """The state of one call of `resolve`.

    Attributes:
        done: by id, each object and its result; keeps the object alive, so that its id stays
            unique. The result is missing while its parts are being resolved.
        sizes: by id, the number of values in it, with what is shared counted at each place.
        count: number of values so far, likewise.
        repeated: number of those that occurred before.
    """

    def __init__(self) -> None:
        self.done: dict[int, tuple[Any, Any]] = {}
        self.sizes: dict[int, int] = {}
        self.count = self.repeated = 0

    def resolve(self, node: Any) -> Any:
        self.count += 1
        if node is None or isinstance(
            node, (bool, int, float, complex, str, Discarded, torch.dtype)
        ):
            return node
        if id(node) in self.done:
            return self._again(id(node))
        before = self.count
        self.done[id(node)] = (node, _OPEN)
        result = self._build(node)
        self.done[id(node)] = (node, result)
        self.sizes[id(node)] = self.count - before
        return result

    def _again(self, key: int) -> Any:
        result = self.done[key][1]
        if result is _OPEN:
            return Discarded("part of itself")
        self.count += self.sizes[key]
        self.repeated += self.sizes[key]
        if self.repeated > MAX_REPEATED:
            raise MalformedError("it repeats the same content over and over")
        return result

    def _build(self, node: Any) -> Any:
        if isinstance(node, (TensorRecipe, ArrayRecipe)):
            return node.build()
        if isinstance(node, Mapping):
            mapping = {key: self.resolve(value) for key, value in node.items()}
            if isinstance(node.metadata, dict):
                own = self.resolve(node.metadata.get("moco-det"))  # written by this project
                if isinstance(own, dict):
                    mapping["metadata"] = own
            return mapping
        if isinstance(node, (list, tuple)):
            parts = [self.resolve(value) for value in node]
            return tuple(parts) if isinstance(node, tuple) else parts
        if isinstance(node, (bytes, bytearray)):
            return bytes(node)
        if isinstance(node, StandIn):
            return self._build_object(node)
        stand_in = isinstance(node, type) and issubclass(node, StandIn)
        return Discarded(node.path if stand_in else type(node).__name__)

    def _build_object(self, node: StandIn) -> dict[str, Any] | Discarded:
        """Build the tensors of a pickled ``nn.Module``, nested like its submodules."""
        state = node.state
        if isinstance(state, dict) and isinstance(state.get("_parameters"), dict):
            members = (state.get(part) for part in ("_parameters", "_buffers", "_modules"))
            return {
                name: self.resolve(value)
                for part in members
                if isinstance(part, dict)
                for name, value in part.items()
            }
        result = Discarded(node.path)
        if node.path in _NAMESPACES and isinstance(state, dict):
            result.values = {key: self.resolve(value) for key, value in state.items()}
        return result

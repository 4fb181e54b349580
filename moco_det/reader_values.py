"""What a pickle may become: records that are filled while it is read, and built afterwards.

Storages may follow their tensors in a file, and arrays are filled after they are made, so reading
yields recipes; :func:`resolve` turns them into tensors once everything is there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Discarded:
    """Stands where the file held an object that is not data; ``name`` is that object's class."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<discarded {self.name}>"


class StandIn:
    """Base of the classes that replace unknown ones; keeps its state, for pickled modules only."""

    path = "object"
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        return StandIn()

    def __setstate__(self, state: Any) -> None:
        self.state = state[0] if isinstance(state, tuple) and len(state) == 2 else state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...


class Mapping(dict[Any, Any]):
    """Ordered and default dictionaries: a plain one. Attributes are kept only as ``_metadata``."""

    metadata: Any = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*(a for a in args if isinstance(a, (dict, list))))  # no default_factory

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.metadata = state.get("_metadata")


class Storage:
    """The bytes behind tensors, as a 1-D uint8 tensor that may be filled in later."""

    def __init__(self, dtype: torch.dtype, numel: int, data: Tensor | None = None) -> None:
        self.dtype, self.numel, self.data = dtype, int(numel), data

    @property
    def nbytes(self) -> int:
        """Bytes that its numbers take."""
        return self.numel * self.dtype.itemsize

    def view(self, dtype: torch.dtype) -> Tensor:
        """Its numbers, flat, not copied where they are aligned (`ValueError`: too few bytes)."""
        if self.data is None or self.data.numel() < self.nbytes:
            raise ValueError("a tensor's data is shorter than its declared size")
        data = self.data[: self.nbytes]
        if data.storage_offset() % dtype.itemsize:  # legacy files do not align
            data = data.clone()
        return data.view(dtype)


class TensorRecipe:
    """A tensor that is still a recipe: its storage may follow later in the file."""

    def __init__(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None
    ) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:  # attributes of tensors are not data
        pass

    def build(self) -> Tensor | Discarded:
        """The tensor, a view of its storage (`ValueError`: it reaches beyond it)."""
        if not isinstance(self.storage, Storage):
            raise ValueError("a tensor without a storage")
        size, stride = tuple(map(int, self.size)), tuple(map(int, self.stride))
        if math.prod(size) > self.storage.numel:  # expanded: a few bytes may claim terabytes
            return Discarded("expanded tensor")
        offset = int(self.offset)
        flat = self.storage.view(self.dtype or self.storage.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if offset < 0 or min((0, *size, *stride)) < 0 or (0 not in size and last >= len(flat)):
            raise ValueError("a tensor reaches beyond its data")
        return flat.as_strided(size, stride, flat.storage_offset() + offset)


class DType:
    """``numpy.dtype`` as a string; only plain numbers and booleans are understood."""

    def __init__(self, code: Any = "", *flags: Any) -> None:
        self.code = str(code)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "="):
            self.code = state[1] + self.code.lstrip("<>=|")

    def numpy(self) -> np.dtype[Any] | None:
        """NumPy's own, where it is one of numbers or booleans; else None."""
        kind = self.code.lstrip("<>=|")
        known = kind[:1] in "fiubc" and kind[1:].isdigit()
        return np.dtype(self.code) if known else None


class ArrayRecipe:
    """``numpy.ndarray``: made empty and filled by its state, or made from a buffer."""

    def __init__(self, shape: Any = (), dtype: Any = "", data: Any = None, *more: Any) -> None:
        known = dtype if isinstance(dtype, DType) else DType(dtype)
        self.state: tuple[Any, ...] = (shape, known, False, data)

    def __setstate__(self, state: Any) -> None:
        self.state = tuple(state)[-4:]  # (version,) shape, dtype, is_fortran, data

    def build(self) -> Tensor | np.ndarray[Any, Any] | Discarded:
        """The array as a tensor where torch has its type, else as NumPy's."""
        shape, dtype, fortran, data = self.state
        self.state = ()  # built once: the bytes go as their copy comes
        known = dtype.numpy() if isinstance(dtype, DType) else None
        if known is None or not isinstance(data, (bytes, bytearray, str)):
            return Discarded(f"numpy array of {getattr(dtype, 'code', dtype)!r}")
        data = data.encode("latin1") if isinstance(data, str) else data
        raw = data if isinstance(data, bytearray) else bytearray(data)  # a tensor is writable
        shape = tuple(map(int, shape if isinstance(shape, (tuple, list)) else (shape,)))
        if math.prod(shape) * known.itemsize != len(raw):
            raise ValueError("an array's data does not fill its shape")
        array = np.frombuffer(raw, known).reshape(shape, order="F" if fortran else "C")
        array = array.astype(known.newbyteorder("="), copy=False)
        try:
            return torch.from_numpy(array)
        except TypeError:  # unsigned 16 to 64 bits, on older versions of torch
            return array


def resolve(tree: Any) -> Any:
    """Build the tensors of what :class:`DataUnpickler` returned; stand-ins become Discarded.

    A pickled module (``torch.save(model)``) becomes the nested dictionary of its tensors. Shared
    parts stay shared, so that a small file cannot unfold into a large tree.

    Raises:
        ValueError, TypeError, RuntimeError: a tensor or an array contradicts itself.
        RecursionError: nested too deeply.
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
    elif isinstance(node, dict):
        result = {}
        done[id(node)] = (node, result)  # before its parts: it may contain itself
        for key, value in node.items():
            result[_key(key)] = _resolve(value, done)
        if isinstance(node, Mapping) and isinstance(node.metadata, dict):
            own = _resolve(node.metadata.get("moco-det"), done)  # written by this project
            if isinstance(own, dict):
                result["metadata"] = own
    elif isinstance(node, (list, set, frozenset)):
        result = []
        done[id(node)] = (node, result)
        result.extend(_resolve(value, done) for value in node)
    elif isinstance(node, tuple):
        result = tuple(_resolve(value, done) for value in node)
    elif isinstance(node, (bytes, bytearray)):
        result = bytes(node)
    elif isinstance(node, Storage):
        result = Discarded("storage")
    elif isinstance(node, StandIn):
        module = _module(node, done)
        result = Discarded(node.path) if module is None else module
    else:
        path = node.path if isinstance(node, type) and issubclass(node, StandIn) else repr(node)
        result = Discarded(path)
    done[id(node)] = (node, result)  # the node is kept, so that its id stays its own
    return result


def _key(key: Any) -> Any:
    if isinstance(key, (str, int, float, bool)) or key is None:
        return key
    return key.decode("latin1") if isinstance(key, bytes) else repr(type(key).__name__)


def _module(node: StandIn, done: dict[int, tuple[Any, Any]]) -> dict[str, Any] | None:
    """The tensors of a pickled ``nn.Module``, nested as its submodules are; None if it is none."""
    state = node.state
    if not isinstance(state, dict) or not isinstance(state.get("_parameters"), dict):
        return None
    result: dict[str, Any] = {}
    done[id(node)] = (node, result)
    for part in ("_parameters", "_buffers", "_modules"):
        for name, value in (state.get(part) or {}).items():
            result[_key(name)] = _resolve(value, done)
    return result

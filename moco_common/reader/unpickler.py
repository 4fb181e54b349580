"""Unpickling as data: tensors, arrays and plain values are rebuilt, everything else is a name.

No class or function that a file names is ever imported or called: a name is looked up in
:data:`_SAFE` (constructors of the plain records in reader_values.py), and any other name becomes a
stand-in that swallows its arguments. A name of the standard library that no checkpoint has a reason
to hold (``os.system``, ``builtins.eval``, ...) refuses the whole file.
"""

from __future__ import annotations

import builtins
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

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


# Roots of the standard library whose objects honest checkpoints carry (hyper-parameters, paths,
# loggers): discarded silently. "root.name" allows one name only.
_HONEST = frozenset(
    """abc argparse array collections copyreg dataclasses datetime decimal enum fractions logging
    numbers pathlib re string typing uuid zoneinfo types.SimpleNamespace types.MappingProxyType
    functools.partial random.Random time.struct_time _codecs.encode io.BytesIO _io.BytesIO
    io.StringIO _io.StringIO itertools weakref operator.itemgetter operator.attrgetter
    """.split()  # noqa: SIM905
)
# Beyond it, what is known to run code or to read other files.
_RUNS_CODE = (
    "numpy.distutils.",
    "numpy.f2py.",
    "numpy.load",
    "numpy.testing.",
    "pip.",
    "setuptools.",
    "torch.hub.",
    "torch.jit.",
    "torch.load",
    "torch.ops.",
    "torch.serialization.load",
    "torch.utils.cpp_extension.",
)
_NUMPY_CORE = ("numpy.core.", "numpy._core.")


class UnsafePickleError(Exception):
    """The file names something that runs code; ``str()`` of it is that name."""


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    known = dtype.numpy() if isinstance(dtype, DType) else None
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if known is None or not isinstance(raw, bytes) or len(raw) != known.itemsize:
        return Discarded("numpy scalar")
    return np.frombuffer(raw, known)[0].item()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *more: Any) -> ArrayRecipe:
    array = ArrayRecipe()
    array.state = (shape, dtype, order == "F", data)
    return array


def _encode(text: Any, *encoding: Any) -> bytes:
    return text.encode("latin1") if isinstance(text, str) else b""


def _reconstructor(cls: Any, *more: Any) -> Any:
    return cls() if isinstance(cls, type) and issubclass(cls, StandIn) else StandIn()


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *more: Any
) -> TensorRecipe:
    return TensorRecipe(
        storage, offset, size, stride, dtype if isinstance(dtype, torch.dtype) else None
    )


def _from_type(function: Any, cls: Any, args: Any, *state: Any) -> Any:
    safe = function in (_SAFE[f"torch._utils._rebuild_{name}"] for name in ("tensor_v2", "tensor"))
    return function(*args) if safe and isinstance(args, tuple) else Discarded("tensor subclass")


_SAFE: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": Mapping,
    "collections.defaultdict": Mapping,
    "collections.Counter": Mapping,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytearray": lambda *a: bytearray(a[0]) if a and isinstance(a[0], bytes) else b"",
    "builtins.complex": complex,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "torch.Size": lambda *a: tuple(a[0]) if a and isinstance(a[0], (tuple, list)) else (),
    "torch.device": lambda *a: ":".join(map(str, a)),
    "torch._utils._rebuild_tensor": lambda s, o, z, t: TensorRecipe(s, o, z, t),
    "torch._utils._rebuild_tensor_v2": lambda s, o, z, t, *more: TensorRecipe(s, o, z, t),
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *more: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *more: data,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": lambda data=None, *more: data,
    "numpy.dtype": DType,
    "numpy.ndarray": ArrayRecipe,
}
_SAFE_NUMPY: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": lambda *more: ArrayRecipe(),
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}


def _honest(module: str, name: str) -> bool:
    root, first = module.split(".")[0], name.split(".")[0]
    if root == "builtins":  # types; Python 3.11 pickles enumerations by getattr
        return first == "getattr" or isinstance(getattr(builtins, first, None), type)
    known = root in sys.stdlib_module_names or root in ("commands", "popen2")  # the last: Python 2
    if not known:
        return not f"{module}.{name}".startswith(_RUNS_CODE)
    return root in _HONEST or f"{root}.{first}" in _HONEST


class DataUnpickler(pickle._Unpickler):
    """Unpickles data only. Tensors come out as recipes: :func:`resolve` builds them.

    It stands on the standard library's Python unpickler: the one in C can be made to fill the
    memory by a single instruction (a large index of its memo). The instructions are few: the
    bytes of tensors and arrays are read in one piece each.

    Args:
        file: binary file, at the pickle's first byte.
        storage: from a persistent identifier to the :class:`Storage` it names.
        nested: reads a whole torch file held in bytes, for tensors pickled outside torch.save.
    """

    def __init__(
        self,
        file: BinaryIO,
        storage: Callable[[tuple[Any, ...]], Storage] | None = None,
        nested: Callable[[bytes], Any] | None = None,
    ) -> None:
        super().__init__(file, encoding="latin1")
        self._storage, self._nested = storage, nested
        self._stand_ins: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Protocols up to 2 use Python 2's names, Python 3's torch.save included.
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if module == "builtins":
            name = {"long": "int", "unicode": "str", "xrange": "range"}.get(name, name)
        path = f"{module}.{name}"
        if path == "torch.storage._load_from_bytes" and self._nested is not None:
            return self._nested
        if path in _SAFE:
            return _SAFE[path]
        if module.startswith(_NUMPY_CORE) and f"{module.split('.')[2]}.{name}" in _SAFE_NUMPY:
            return _SAFE_NUMPY[f"{module.split('.')[2]}.{name}"]
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if not _honest(module, name):
            raise UnsafePickleError(path)
        return self._stand_ins.setdefault(path, type("StandIn", (StandIn,), {"path": path}))

    def persistent_load(self, identifier: Any) -> Any:
        if isinstance(identifier, tuple) and self._storage is not None:
            if identifier[0] == "module" and len(identifier) > 1:  # legacy: a class, its source
                return identifier[1]
            if len(identifier) > 4 and isinstance(identifier[1], torch.dtype):
                return self._storage(identifier)
        raise pickle.UnpicklingError("a reference to something outside the file")

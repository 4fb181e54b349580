"""Unpickling as data: tensors, arrays and plain values are rebuilt; all else becomes a placeholder.

No class or function that a file names is ever imported or called: a name is looked up in `SAFE`
(functions of this module, which create the records of records.py), and any other name becomes a
stand-in that ignores its arguments. A file that names something of the standard library that no
checkpoint needs (``os.system``, ``builtins.eval``, ...) is refused. A file can change only the
objects that it has created itself, and the memory that reading takes is bounded by its size.
"""

from __future__ import annotations

import builtins
import pickle
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

from moco_common.reader.errors import MalformedError, UnsafePickleError
from moco_common.reader.records import (
    ArrayRecipe,
    Discarded,
    DType,
    Mapping,
    StandIn,
    Storage,
    TensorRecipe,
    latin1,
)

# Roots of the standard library whose objects occur in honest checkpoints (hyper-parameters, paths,
# loggers): discarded silently. "root.name" allows one name only.
_HONEST = frozenset(
    """abc argparse array collections copyreg dataclasses datetime decimal enum fractions logging
    numbers pathlib re string typing uuid zoneinfo types.SimpleNamespace types.MappingProxyType
    functools.partial random.Random time.struct_time _codecs.encode io.BytesIO _io.BytesIO
    io.StringIO _io.StringIO itertools weakref operator.itemgetter operator.attrgetter
    """.split()  # noqa: SIM905
)
# Names of other packages that are known to run code or to read other files.
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


def _scalar(dtype: Any, raw: Any = b"", *more: Any) -> Any:
    known = dtype.numpy() if isinstance(dtype, DType) else None
    raw = latin1(raw) if isinstance(raw, str) else raw
    if known is None or not isinstance(raw, bytes) or len(raw) != known.itemsize:
        return Discarded("numpy scalar")
    return np.frombuffer(raw, known)[0].item()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *more: Any) -> ArrayRecipe:
    array = ArrayRecipe()
    array.state = (shape, dtype, order == "F", data)
    return array


def _mapping(*args: Any) -> Mapping:
    result = Mapping()
    for items in args:
        if isinstance(items, dict):
            result.update(items)
        elif isinstance(items, (list, tuple)):  # of pairs
            pairs = [p for p in items if isinstance(p, (list, tuple)) and len(p) == 2]
            result.put([part for pair in pairs for part in pair])
    return result


def _sequence(items: Any = (), *more: Any) -> list[Any]:
    return list(items) if isinstance(items, (list, tuple)) else []


def _size(items: Any = (), *more: Any) -> tuple[Any, ...]:
    return tuple(items) if isinstance(items, (list, tuple)) else ()


def _bytearray(content: Any = b"", *encoding: Any) -> bytes | bytearray:
    if isinstance(content, str):
        return latin1(content)
    return bytearray(content) if isinstance(content, bytes) else b""


def _encode(text: Any, *encoding: Any) -> bytes:
    return latin1(text) if isinstance(text, str) else b""


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    numbers = isinstance(real, (int, float)) and isinstance(imaginary, (int, float))
    return complex(real, imaginary) if numbers else 0j


def _device(*parts: Any) -> str:
    return ":".join(str(part) for part in parts if isinstance(part, (str, int)))


def _reconstructor(cls: Any, *more: Any) -> StandIn:
    return cls() if isinstance(cls, type) and issubclass(cls, StandIn) else StandIn()


def _reconstruct(*more: Any) -> ArrayRecipe:
    return ArrayRecipe()


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
    if more[2:] and more[2]:  # a lazy conjugation or negation is not in the bytes
        return Discarded("lazily conjugated tensor")
    return TensorRecipe(storage, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *more: Any
) -> TensorRecipe:
    tensor = TensorRecipe(storage, offset, size, stride)
    tensor.dtype = dtype if isinstance(dtype, torch.dtype) else None
    return tensor


def _parameter(data: Any = None, *more: Any) -> Any:
    return data


def _from_type(function: Any, cls: Any, args: Any, *state: Any) -> Any:
    safe = function in (_tensor, _tensor_v3) and isinstance(args, tuple) and len(args) > 6
    return function(*args) if safe else Discarded("tensor subclass")


# Names that a file may call. A real writer needs each of them, see
# tests/moco_common/reader/test_unpickler.py.
SAFE: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "collections.Counter": _mapping,
    "builtins.set": _sequence,
    "builtins.frozenset": _sequence,
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "numpy.dtype": DType,
    "numpy.ndarray": ArrayRecipe,
}
# The same for numpy.core, which is called numpy._core since NumPy 2.
SAFE_NUMPY: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": _reconstruct,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,
}
STORAGES = {
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


class Allowance:
    """The amount that a file may have copied while it is read: a multiple of its own size."""

    def __init__(self, size: int) -> None:
        self.left = 16 * size + (1 << 20)

    def spend(self, arguments: tuple[Any, ...]) -> None:
        """Charge for a call, which may copy each of its arguments."""
        sized = (str, bytes, bytearray, list, tuple, dict)
        self.left -= sum(len(value) for value in arguments if isinstance(value, sized))
        if self.left < 0:
            raise MalformedError("it copies the same content over and over")


class BoundedFile:
    """A file for the unpickler that allocates nothing for bytes beyond its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.readline = file.readline

    def check(self, count: int) -> int:
        """Return ``count`` if so many bytes are left."""
        if count < 0 or count > self.size - self.file.tell():
            raise EOFError
        return count

    def read(self, count: int) -> bytes:
        """Return exactly ``count`` bytes."""
        content = self.file.read(self.check(count) if count > 1 << 16 else count)
        if len(content) < count:
            raise EOFError
        return content


# Exceptions of the standard library's unpickler for bytes that are not a pickle.
_NO_PICKLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    struct.error,
)
_STATEFUL = (StandIn, Mapping, TensorRecipe, DType, ArrayRecipe)


class DataUnpickler(pickle._Unpickler):
    """Unpickles data only. Tensors come out as recipes: `resolve` builds them.

    It extends the standard library's Python unpickler: the one in C can be made to fill the memory
    by a single instruction (a large index of its memo). The instructions are few, since the bytes
    of tensors and arrays are read in one piece each. Instructions that call or change something
    are replaced, so that they reach only what `SAFE` allows or the file has created.

    Args:
        file: binary file at the first byte of the pickle.
        allowance: budget shared by all pickles of one file.
        storage: returns the storage for a dtype, a key and a number of elements.
        nested: reads a whole torch file in bytes, for tensors pickled outside torch.save.
    """

    # Members of the base class that its stubs lack.
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        file: BoundedFile | BinaryIO,
        allowance: Allowance,
        *,
        storage: Callable[[torch.dtype, str, int], Storage] | None = None,
        nested: Callable[[bytes, Allowance], Any] | None = None,
    ) -> None:
        super().__init__(file, encoding="latin1")
        self._allowance, self._storage, self._nested = allowance, storage, nested
        self._stand_ins: dict[str, type] = {}

    def load(self) -> Any:
        """Read one pickle.

        Raises:
            MalformedError, EOFError, UnpicklingError: the bytes are not a pickle, or end too early.
            UnsafePickleError: the pickle names something that could run code.
        """
        try:
            return super().load()
        except _NO_PICKLE as error:
            trace = error.__traceback__
            while trace and trace.tb_next:
                trace = trace.tb_next
            if trace and trace.tb_frame.f_globals.get("__name__") == pickle.__name__:
                raise MalformedError("its content is malformed") from None
            raise  # raised by this file, not by the standard library: a bug

    def find_class(self, module: str, name: str) -> Any:
        """Return the record or stand-in that replaces a class or function."""
        # Protocols up to 2 use Python 2's names, Python 3's torch.save included.
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if module == "builtins":
            name = {"long": "int", "unicode": "str", "xrange": "range"}.get(name, name)
        path = f"{module}.{name}"
        if path == "torch.storage._load_from_bytes" and self._nested is not None:
            return self._load_from_bytes
        if path in SAFE:
            return SAFE[path]
        if module.startswith(_NUMPY_CORE) and f"{module.split('.')[2]}.{name}" in SAFE_NUMPY:
            return SAFE_NUMPY[f"{module.split('.')[2]}.{name}"]
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if not _honest(module, name):
            raise UnsafePickleError(path)
        return self._stand_ins.setdefault(path, type("StandIn", (StandIn,), {"path": path}))

    def persistent_load(self, identifier: Any) -> Any:
        """Return the storage for torch.save's ("storage", type, key, device, elements, view)."""
        if isinstance(identifier, tuple) and self._storage is not None and len(identifier) > 1:
            if identifier[0] == "module":  # legacy: a class, its source
                return identifier[1]
            _, dtype, key, _, numel, *view = (*identifier, None, None, None)
            if view[0] is not None and len(identifier) > 5:
                raise MalformedError("views of storages, written by PyTorch before 0.4")
            known = isinstance(dtype, torch.dtype) and isinstance(key, (str, int))
            if known and isinstance(numel, int) and 0 <= numel < 1 << 62:
                return self._storage(dtype, str(key), numel)
        raise MalformedError("a reference to something outside the file")

    def _load_from_bytes(self, content: Any = None) -> Any:
        if not isinstance(content, bytes) or self._nested is None:
            raise MalformedError("a pickled tensor without bytes")
        return self._nested(content, self._allowance)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise MalformedError("a call without arguments")
        if isinstance(function, StandIn):
            return function(*arguments)
        if isinstance(function, type) and issubclass(function, StandIn):
            return function()
        self._allowance.spend(arguments)
        try:
            return function(*arguments)
        except TypeError as error:
            if (
                error.__traceback__ and error.__traceback__.tb_next
            ):  # raised inside the function, not by the call
                raise
            raise MalformedError("a call with the wrong arguments") from None

    def _instantiate(self, klass: Any, args: list[Any]) -> None:
        self.append(self._call(klass, tuple(args)))

    def _top(self) -> Any:
        if not self.stack:
            raise MalformedError("its content is malformed")
        return self.stack[-1]

    def _pop(self) -> Any:
        top = self._top()
        del self.stack[-1]
        return top

    def _load_reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self.append(self._call(function, arguments))

    def _load_newobj(self) -> None:
        arguments, cls = self._pop(), self._pop()
        self.append(self._call(cls, arguments))

    def _load_newobj_ex(self) -> None:
        self._pop()  # keyword arguments
        self._load_newobj()

    def _load_build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, _STATEFUL):
            self._allowance.spend(state if isinstance(state, tuple) else ())
            target.set_state(state)
        elif not isinstance(target, Discarded):
            self._refuse_change(target)

    def _load_setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._put([key, value])

    def _load_setitems(self) -> None:
        self._put(self.pop_mark())

    def _put(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Mapping):
            target.put(items)
        elif not isinstance(target, StandIn):
            self._refuse_change(target)

    def _load_append(self) -> None:
        value = self._pop()
        self._extend([value])

    def _load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, StandIn):
            self._refuse_change(target)

    def _refuse_change(self, target: Any) -> None:
        if callable(target):
            raise UnsafePickleError(f"{target.__module__}.{target.__name__}")
        raise MalformedError(f"a change of a {type(target).__name__}")

    def _load_empty_dict(self) -> None:
        self.append(Mapping())

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append(Mapping())
        self._put(items)

    def _load_set(self) -> None:
        self.append([])

    def _load_frozenset(self) -> None:
        self.append(self.pop_mark())

    def _load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch = pickle._Unpickler.dispatch | {  # type: ignore[assignment]
        pickle.REDUCE[0]: _load_reduce,
        pickle.NEWOBJ[0]: _load_newobj,
        pickle.NEWOBJ_EX[0]: _load_newobj_ex,
        pickle.BUILD[0]: _load_build,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.APPEND[0]: _load_append,
        pickle.APPENDS[0]: _load_appends,
        pickle.ADDITEMS[0]: _load_appends,
        pickle.EMPTY_DICT[0]: _load_empty_dict,
        pickle.DICT[0]: _load_dict,
        pickle.EMPTY_SET[0]: _load_set,
        pickle.FROZENSET[0]: _load_frozenset,
        pickle.BYTEARRAY8[0]: _load_bytearray8,
    }

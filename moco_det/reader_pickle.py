"""Unpickling as data: tensors, arrays and plain values are rebuilt, everything else is a name.

No class or function that a file names is ever imported or called: a name is looked up in
:data:`_SAFE` (constructors of the plain records in reader_values.py), and any other name becomes a
stand-in that swallows its arguments. A name of the standard library that no checkpoint has a reason
to hold (``os.system``, ``builtins.eval``, ...) refuses the whole file.
"""

from __future__ import annotations

import builtins
import pickle
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

from moco_det.reader_values import (
    ArrayRecipe,
    Discarded,
    DType,
    Mapping,
    StandIn,
    Storage,
    TensorRecipe,
)

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

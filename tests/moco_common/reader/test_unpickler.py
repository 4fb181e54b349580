"""What a file may have called, and what it may change: nothing but its own parts."""

import argparse
import collections
import io
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moco_common.reader import formats, records, unpickler
from moco_common.reader.errors import CheckpointError, UnsafePickleError
from moco_common.reader.formats import read_checkpoint
from moco_common.reader.records import StandIn
from moco_common.reader.unpickler import Allowance, DataUnpickler
from moco_det.conversion.weight_files import _PortablePickler


class _Tagged(torch.Tensor):
    """A subclass, as torchvision's image types are."""


def _parameter_with_state() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "x"
    return parameter


class _RebuildTensor:
    """A tensor as PyTorch before 0.4 wrote it."""

    def __reduce__(self):
        storage = torch.ones(3).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32)
        return torch._utils._rebuild_tensor, (typed, 0, (3,), (1,))


def _torch(tree, **options):
    buffer = io.BytesIO()
    torch.save(tree, buffer, **options)
    return buffer.getvalue()


def _pickle(tree, protocol=2):
    return pickle.dumps(tree, protocol)


def _converted(tree):
    """As tools/convert.py writes .pkl files, for any version of NumPy."""
    buffer = io.BytesIO()
    _PortablePickler(buffer, protocol=5).dump(tree)
    return buffer.getvalue()


# Each name that may be called, and a file of a real writer that has it called.
WRITERS = {
    "collections.OrderedDict": lambda: _torch(torch.nn.Linear(1, 1).state_dict()),
    "collections.defaultdict": lambda: _torch({"state": collections.defaultdict(dict, {0: 1})}),
    "collections.Counter": lambda: _torch({"milestones": collections.Counter([30, 60])}),
    "builtins.set": lambda: _pickle({"frozen": {1}}),
    "builtins.frozenset": lambda: _pickle({"frozen": frozenset([1])}),
    "builtins.bytearray": lambda: _pickle({"a": bytearray(b"ab")}, 4),
    "builtins.complex": lambda: _pickle({"a": 1 + 2j}),
    "_codecs.encode": lambda: _pickle({"a": b"\xff"}),
    "copyreg._reconstructor": lambda: _pickle({"args": argparse.Namespace(lr=1)}, 0),
    "torch.Size": lambda: _torch({"shape": torch.Size([2, 3])}),
    "torch.device": lambda: _torch({"device": torch.device("cpu")}),
    "torch._utils._rebuild_tensor": lambda: _torch({"w": _RebuildTensor()}),
    "torch._utils._rebuild_tensor_v2": lambda: _torch({"w": torch.ones(2)}),
    "torch._utils._rebuild_tensor_v3": lambda: _torch({"w": torch.ones(2).to(torch.uint16)}),
    "torch._utils._rebuild_parameter": lambda: _torch({"w": torch.nn.Parameter(torch.ones(2))}),
    "torch._utils._rebuild_parameter_with_state": lambda: _torch({"w": _parameter_with_state()}),
    "torch._tensor._rebuild_from_type_v2": lambda: _torch(
        {"w": torch.ones(2).as_subclass(_Tagged)}
    ),
    "numpy.dtype": lambda: _pickle({"w": np.ones(2)}),
    "numpy.ndarray": lambda: _converted({"w": np.ones(2)}),
    "multiarray._reconstruct": lambda: _pickle({"w": np.ones(2)}),
    "multiarray.scalar": lambda: _pickle({"best": np.float64(1)}),
    "numeric._frombuffer": lambda: _pickle({"w": np.ones(2)}, 5),
}
if not hasattr(torch, "uint16"):
    WRITERS["torch._utils._rebuild_tensor_v3"] = lambda: pytest.skip("this torch has no uint16")


def _read(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    return read_checkpoint(tmp_path / "a.pth")


def _table(name):
    return unpickler.SAFE if name in unpickler.SAFE else unpickler.SAFE_NUMPY


def test_every_name_that_a_file_may_call_has_a_writer_here():
    assert set(unpickler.SAFE) | set(unpickler.SAFE_NUMPY) == set(WRITERS)


@pytest.mark.parametrize("name", WRITERS)
def test_a_real_writer_needs_the_name(tmp_path, monkeypatch, name):
    content = WRITERS[name]()
    with_name = repr(_read(tmp_path, content))
    monkeypatch.setitem(_table(name), name, lambda *_: pytest.fail("called"))
    monkeypatch.delitem(_table(name), name)
    assert repr(_read_or_refusal(tmp_path, content)) != with_name


def _read_or_refusal(tmp_path, content):
    try:
        return _read(tmp_path, content)
    except CheckpointError as error:
        return error


def test_a_table_holds_functions_and_classes_of_the_reader_alone():
    for table in (unpickler.SAFE, unpickler.SAFE_NUMPY):
        modules = {function.__module__ for function in table.values()}
        assert modules <= {unpickler.__name__, records.__name__}
    assert {type(value) for value in unpickler.STORAGES.values()} == {torch.dtype}


DANGEROUS = [
    *(f"builtins.{n}" for n in "getattr eval exec compile open __import__ setattr delattr".split()),
    *(f"builtins.{n}" for n in "input breakpoint globals vars map filter type object".split()),
    *("os.system", "posix.system", "nt.system", "os.popen", "os.execv", "os.remove"),
    *("subprocess.Popen", "subprocess.call", "shutil.rmtree", "pty.spawn", "socket.socket"),
    *("importlib.import_module", "runpy.run_path", "ctypes.CDLL", "pickle.loads", "code.interact"),
    *("functools.partial", "operator.attrgetter", "operator.methodcaller", "copyreg.add_extension"),
    *("types.FunctionType", "types.CodeType", "sys.exit", "webbrowser.open", "codecs.open"),
    *("numpy.load", "numpy.fromfile", "numpy.memmap", "torch.load", "torch.jit.load"),
    *("torch.hub.load", "torch.ops.load_library", "torch.utils.cpp_extension.load"),
    *("torch.serialization.load", "torch.classes.load_library"),
    *("moco_common.reader.unpickler.DataUnpickler", "moco_common.files.replace_file"),
    *("pathlib.Path.unlink", "pathlib.Path.write_text", "logging.config.fileConfig"),
]


@pytest.mark.parametrize("path", DANGEROUS)
@pytest.mark.parametrize("form", ["reduce", "newobj", "inst", "obj"])
def test_a_dangerous_name_is_refused_or_a_stand_in(tmp_path, path, form):
    module, _, name = path.rpartition(".")
    try:
        found = DataUnpickler(io.BytesIO(b""), Allowance(0)).find_class(module, name)
    except UnsafePickleError:
        found = StandIn  # nothing was found
    assert issubclass(found, StandIn)
    called = f"c{module}\n{name}\n".encode()
    argument = b"(S'x'\nt"
    stream = {
        "reduce": called + argument + b"R.",
        "newobj": b"\x80\x02" + called + argument + b"\x81.",
        "inst": b"(S'x'\n" + f"i{module}\n{name}\n".encode() + b".",
        "obj": b"(" + called + b"S'x'\no.",
    }[form]
    read = _read_or_refusal(tmp_path, stream)
    assert isinstance(read, (CheckpointError, records.Discarded))
    assert not isinstance(read, CheckpointError) or read.kind == "hostile"


# Instructions that change what is on top of the stack, after it.
CHANGES = {
    "attributes (BUILD)": b"}S'__defaults__'\n(lp0\nsb",
    "slots (BUILD)": b"(N}S'__defaults__'\nI1\nstb",
    "item (SETITEM)": b"S'a'\nI1\ns",
    "items (SETITEMS)": b"(S'a'\nI1\nu",
    "append (APPEND)": b"I1\na",
    "appends (APPENDS)": b"(I1\ne",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_file_cannot_change_the_reader(tmp_path, change, name):
    module, _, attribute = name.rpartition(".")
    module = f"numpy.core.{module}" if name in unpickler.SAFE_NUMPY else module
    function = _table(name)[name]
    before = {k: getattr(function, k, None) for k in ("__defaults__", "__code__", "__init__")}
    own = dict(vars(function))
    (tmp_path / "a.pkl").write_bytes(f"c{module}\n{attribute}\n".encode() + CHANGES[change] + b".")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pkl")
    assert caught.value.kind == "hostile"
    assert {k: getattr(function, k, None) for k in before} == before
    assert dict(vars(function)) == own


def _doubled(count):
    """A tuple of two of a tuple of two ...: 2^count leaves in a few bytes a level."""
    return b"I1\n" + b"".join(b"p%d\ng%d\n\x86" % (i, i) for i in range(count))


def _copied(times):
    """One text of a kilobyte, made bytes over and over."""
    text = b"X" + struct.pack("<I", 50_000) + b"x" * 50_000 + b"q\x00"
    call = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    return b"\x80\x02(" + text + call * times + b"l."


EXPENSIVE = {
    "a key that takes for ever to hash": b"\x80\x02}" + _doubled(60) + b"I1\ns.",
    "a member of a set that takes for ever to hash": b"\x80\x04\x8f(" + _doubled(60) + b"\x90.",
    "a device that takes for ever to print": (
        b"\x80\x02ctorch\ndevice\n" + _doubled(60) + b"\x85R."
    ),
    "a dtype that takes for ever to print": b"\x80\x02cnumpy\ndtype\n" + _doubled(60) + b"\x85R.",
    "a bytearray of 2^40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a frame of 2^40 bytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".",
    "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "a large index of the memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "one text copied over and over": _copied(20_000),
}


def test_time_and_memory_are_bounded_by_the_size_of_the_file(tmp_path):
    for number, content in enumerate(EXPENSIVE.values()):
        (tmp_path / f"{number}.pkl").write_bytes(content)
    program = f"""
import resource
from pathlib import Path
from moco_common.reader.formats import read_checkpoint
from moco_common.reader.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sorted(Path({str(tmp_path)!r}).glob("*.pkl")):
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        print(error.kind)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, path
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (list(EXPENSIVE), done.stderr)


@pytest.mark.parametrize("failure", [TypeError, KeyError, IndexError, MemoryError])
@pytest.mark.parametrize("where", ["_tensor", "find_class", "resolve"])
def test_a_bug_of_the_reader_is_not_reported_as_damage(tmp_path, monkeypatch, failure, where):
    def broken(*_):
        raise failure("a bug")

    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth")
    if where == "_tensor":
        monkeypatch.setitem(unpickler.SAFE, "torch._utils._rebuild_tensor_v2", broken)
    elif where == "find_class":
        monkeypatch.setattr(DataUnpickler, "find_class", broken)
    else:
        monkeypatch.setattr(records._Resolver, "_build", broken)
    if failure is MemoryError:  # no bug: it is reported as what it is
        with pytest.raises(CheckpointError, match="needs more memory than is free") as caught:
            read_checkpoint(tmp_path / "a.pth")
        assert caught.value.kind == "memory"
    else:
        with pytest.raises(failure, match="a bug"):
            read_checkpoint(tmp_path / "a.pth")


def _variants(content, generator, count):
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(generator.integers(1, 6)):
            changed[generator.integers(len(content))] = generator.integers(256)
        yield bytes(changed)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_any_mutation_of_a_pickle_is_read_or_refused_but_never_a_traceback(tmp_path, protocol):
    tree = {
        "w": np.arange(6.0).reshape(2, 3), "s": np.float32(1), "set": {1, (2, 3)}, "b": b"\xff",
        "n": [None, 1.5, 2 + 1j, bytearray(b"abc")], "c": collections.Counter("ab"),
    }  # fmt: skip
    content, generator = pickle.dumps(tree, protocol), np.random.default_rng(protocol)
    refused = 0
    for changed in _variants(content, generator, 600):
        refused += isinstance(_read_or_refusal(tmp_path, changed), CheckpointError)
    assert 100 < refused < 600


def test_an_unreadable_file_is_not_called_damaged(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth")

    def broken(*_):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(formats, "refuse_other_formats", broken)
    with pytest.raises(CheckpointError, match="cannot be read .*Input/output") as caught:
        read_checkpoint(tmp_path / "a.pth")
    assert caught.value.kind == "unreadable"

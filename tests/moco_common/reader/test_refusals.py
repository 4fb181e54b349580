"""Hostile and damaged files: nothing runs, and each kind has a sentence of its own."""

import builtins
import errno
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moco_common.reader import formats
from moco_common.reader.errors import CheckpointError
from moco_common.reader.formats import read_checkpoint
from tests.moco_common.bounded import run_bounded


class _Call:
    """Pickles as a call of ``function`` at loading."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _payloads(mark: Path) -> dict[str, Any]:
    touch = f"open({str(mark)!r}, 'w')"
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    return {
        "os.system": _Call(os.system, f"touch {mark}"),
        "builtins.eval": _Call(builtins.eval, touch),
        "builtins.exec": _Call(builtins.exec, code),
        "builtins.open": _Call(builtins.open, str(mark), "w"),
        "builtins.__import__": _Call(builtins.__import__, "antigravity"),
        "subprocess.Popen": _Call(subprocess.Popen, ["touch", str(mark)]),
        "os.mkdir": _Call(os.mkdir, str(mark)),
        "nested in a tensor's arguments": OrderedDict(
            a=[{"b": (torch.ones(1), _Call(getattr, _Call(builtins.__import__, "os"), "system"))}]
        ),
        "argument of a harmless call": _Call(OrderedDict, [[1, _Call(builtins.eval, touch)]]),
    }


_PAYLOADS = tuple(_payloads(Path("x")))


@pytest.mark.parametrize("name", _PAYLOADS)
@pytest.mark.parametrize("container", ["pickle0", "pickle4", "zip", "legacy", "tar"])
def test_hostile_files_execute_nothing_and_are_refused(
    tmp_path: Path, name: str, container: str
) -> None:
    mark, path = tmp_path / "executed", tmp_path / "a.pth"
    tree = {"state_dict": {"conv1.weight": torch.ones(2)}, "x": _payloads(mark)[name]}
    if container.startswith("pickle"):
        path.write_bytes(pickle.dumps(tree, protocol=int(container[-1])))
    elif container == "tar":
        with tarfile.open(path, "w") as archive:
            for member in ("sys_info", "pickle", "tensors", "storages"):
                content = pickle.dumps(tree["x"])
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert not mark.exists()
    assert caught.value.kind == ("unsupported" if container == "tar" else "hostile")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval"])
def test_the_payloads_are_real(tmp_path: Path, name: str) -> None:
    pickle.loads(pickle.dumps(_payloads(tmp_path / "executed")[name]))
    assert (tmp_path / "executed").exists()


def test_a_payload_inside_a_pickled_tensor_is_refused(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save(_Call(os.system, f"touch {tmp_path}/x"), inner, _use_new_zipfile_serialization=False)
    outer = _Call(torch.storage._load_from_bytes, inner.getvalue())
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": outer}))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pkl")
    assert caught.value.kind == "hostile"
    assert not (tmp_path / "x").exists()


def test_reading_imports_no_module_that_the_file_names(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"cturtledemo_absent\nX\n)R.")
    (tmp_path / "b.pkl").write_bytes(
        b"(dS'a'\nctorch.testing._internal.common_utils\nrun_tests\n)Rs."
    )
    before = set(sys.modules)
    read_checkpoint(tmp_path / "b.pkl")
    assert set(sys.modules) == before


def _zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(20_000_000))


def _torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def _unpadded(path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,8]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def _shortened(path: Path, *, zipped: bool, keep: float) -> None:
    torch.save({"a": torch.randn(10_000)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def _large_claim(path: Path) -> None:
    """A storage of 4 elements that claims 65,535."""
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"cpuq\x06K\x04", b"cpuq\x06M\xff\xff"))


def _memo(path: Path) -> None:
    """An index of 2^31 - 1, for which the C unpickler fills 32 GB."""
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f")


_DAMAGED: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "empty": ("empty", "0 bytes", lambda p: p.touch()),
    "html": ("html", "web page", lambda p: p.write_text("\n<!DOCTYPE html><html>404</html>")),
    "s3": (
        "html",
        "web page",
        lambda p: p.write_text("<?xml version='1.0'?><Error>Denied</Error>"),
    ),
    "lfs": (
        "lfs_pointer",
        "git lfs pull",
        lambda p: p.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
    ),
    "zip_bomb": ("zip_bomb", "bomb", _zip_bomb),
    "zip_cut": ("truncated", "truncated", lambda p: _shortened(p, zipped=True, keep=0.7)),
    "legacy_cut": ("truncated", "truncated", lambda p: _shortened(p, zipped=False, keep=0.7)),
    "pickle_cut": ("truncated", "truncated", lambda p: _shortened(p, zipped=False, keep=0.003)),
    "claim": ("damaged", "damaged", _large_claim),
    "memo": ("truncated", "truncated", _memo),
    "safetensors": ("damaged", "shape|Info", _unpadded),
    "noise": ("damaged", "damaged", lambda p: p.write_bytes(bytes(range(1, 256)) * 9)),
    "gzip": ("unknown_format", "gzip", lambda p: p.write_bytes(b"\x1f\x8b" + bytes(99))),
    "npz": ("unknown_format", "NumPy", lambda p: np.savez(p.open("wb"), a=np.ones(3))),
    "json": ("unknown_format", "JSON", lambda p: p.write_text('{"a": 1}')),
    "text": ("unknown_format", "a text", lambda p: p.write_text("# Notes\nnone\n")),
    "number": ("unknown_format", "no tensors", lambda p: p.write_bytes(pickle.dumps(3))),
    "torchscript": ("unsupported", "TorchScript", _torchscript),
    "directory": ("missing_file", "directory", lambda p: p.mkdir()),
    "absent": ("missing_file", "does not exist", lambda p: None),
}


@pytest.mark.parametrize("case", _DAMAGED)
def test_damaged_files_have_their_own_sentence(tmp_path: Path, case: str) -> None:
    kind, words, write = _DAMAGED[case]
    write(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words) as caught:
        read_checkpoint(tmp_path / "a.pth")
    assert caught.value.kind == kind
    assert caught.value.path == tmp_path / "a.pth"
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_of_a_tensor_is_refused_although_torch_loads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(1000), "b": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(1000)) + 500] ^= 1
    path.write_bytes(content)
    assert torch.load(path)["b"].any()
    with pytest.raises(CheckpointError, match=r"data/1 are not those that were written") as caught:
        read_checkpoint(path)
    assert caught.value.kind == "damaged"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_any_flipped_byte_is_read_or_refused_but_never_crashes(
    tmp_path: Path, zipped: bool
) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.randn(3), "b": {"c": 1}}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(400):
        changed = bytearray(content)
        changed[generator.integers(len(content))] = generator.integers(256)
        path.write_bytes(changed)
        with suppress(CheckpointError):
            read_checkpoint(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_only_a_regular_file_is_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.pth"
    if kind == "pipe":
        os.mkfifo(path)  # which would be waited for, for ever
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a pipe, device or socket") as caught:
        read_checkpoint(path)
    assert caught.value.kind == "unreadable"


def _shared_storage(count: int) -> bytes:
    """Many tensors, each of which is all of one storage that is not aligned."""
    buffer = io.BytesIO()
    storage = torch.zeros(100_001, dtype=torch.uint8)
    torch.save({str(i): storage[1:] for i in range(count)}, buffer)
    return buffer.getvalue()


def _nested(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


EXPENSIVE = {
    "2^40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "16 GiB of text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 34) + b"x.",
    "a shared storage": _shared_storage(2_000),
    "deep lists": _nested(200_000),
    "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "deep json of safetensors": struct.pack("<Q", 400_009) + b'{"a":' + b"[" * 400_004,
    "a long integer": b"I" + b"9" * 2_000_000 + b"\n.",
    "a long hexadecimal": b"\x80\x02\x8b"
    + struct.pack("<i", 1_000_000)
    + b"\x7f" * 1_000_000
    + b".",
    "a memo of every object": b"\x80\x04]" + b"\x94" * 500_000 + b".",
    "twice of twice": b"\x80\x02]q\x00"
    + b"".join(b"(h%sh%s\x86q%s0" % (bytes([i]), bytes([i]), bytes([i + 1])) for i in range(100))
    + b"hd.",
}


def test_reading_is_bounded_by_the_file_in_time_and_address_space(tmp_path: Path) -> None:
    for number, content in enumerate(EXPENSIVE.values()):
        (tmp_path / f"{number}.pth").write_bytes(content)
    run_bounded(
        f"""
import time
from pathlib import Path
from moco_common.reader.errors import CheckpointError
from moco_common.reader.formats import read_checkpoint
import safetensors
bound()
for path in sorted(Path({str(tmp_path)!r}).glob("*.pth")):
    began = time.process_time()
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        assert str(error).count("\\n") == 0, error
    assert time.process_time() - began < 20, path
""",
        seconds=200,
        megabytes=500,
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("unable to mmap 9 bytes from file </a.pth>: Cannot allocate memory (12)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_not_a_damaged_file(error, tmp_path, monkeypatch):
    def fails(_):
        raise error

    path = tmp_path / "large.pth"
    torch.save({"a": torch.ones(2)}, path)
    monkeypatch.setattr(formats, "_format_of", lambda head: fails)
    with pytest.raises(CheckpointError, match="more memory than is free") as caught:
        read_checkpoint(path)
    assert caught.value.kind == "memory"
    assert "download" not in str(caught.value)


def test_another_runtime_error_is_a_bug(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(2)}, path)
    monkeypatch.setattr(formats, "_read_zip", lambda source: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        read_checkpoint(path)

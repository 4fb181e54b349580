"""The containers of checkpoints, entry by entry: crafted files are refused where they contradict
themselves, and what the options promise holds."""

import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from moco_common.reader.errors import CheckpointError, TruncatedError
from moco_common.reader.formats import read_checkpoint, read_tensor
from moco_common.reader.unpickler import BoundedFile

W = torch.arange(300.0)


def saved(path: Path, zipped=True, tree=None) -> bytearray:
    torch.save({"w": W} if tree is None else tree, path, _use_new_zipfile_serialization=zipped)
    return bytearray(path.read_bytes())


def refusal(path, kind, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_checkpoint(path)
    assert caught.value.kind == kind


def rewritten(path, change, **options):
    """The zip file with each entry's name and content passed through ``change``."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            if (changed := change(name, content)) is not None:
                archive.writestr(*changed)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("copy", [True, False])
def test_a_copy_outlives_the_file_and_a_map_costs_no_memory(tmp_path, zipped, copy):
    content = saved(tmp_path / "a.pth", zipped)
    w = read_checkpoint(tmp_path / "a.pth", copy=copy)["w"]
    assert torch.equal(w, W)
    at = content.index(W.numpy().tobytes())
    with (tmp_path / "a.pth").open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<f", 7.0))
    assert w[0] == (0.0 if copy or not zipped else 7.0)


def test_safetensors_are_mapped_unless_copied(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    path = tmp_path / "a.safetensors"
    library.save_file({"w": W}, path)
    copied, mapped = (read_checkpoint(path, copy=copy) for copy in (True, False))
    assert copied["__metadata__"] == mapped["__metadata__"] == {}
    with path.open("r+b") as file:
        file.seek(-4 * len(W), 2)
        file.write(struct.pack("<f", 7.0))
    assert copied["w"][0] == 0.0


def test_checksums_are_verified_unless_the_caller_has_done_so(tmp_path):
    path = tmp_path / "a.pth"
    content = saved(path)
    content[content.index(W.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    refusal(path, "damaged", "data/0 are not those")
    assert not torch.equal(read_checkpoint(path, checksums=False)["w"], W)


def test_every_byte_of_a_large_entry_is_verified(tmp_path):
    """Longer than the pieces in which it is read."""
    path = tmp_path / "a.pth"
    content = saved(path, tree={"w": torch.arange(600_000.0)})
    start = content.index(struct.pack("<3f", 0, 1, 2))
    assert torch.equal(read_checkpoint(path)["w"], torch.arange(600_000.0))
    for at in (0, 1 << 20, (1 << 20) + 1, (2 << 20) - 1, 2 << 20, 2_399_999):
        changed = bytearray(content)
        changed[start + at] ^= 1
        path.write_bytes(changed)
        refusal(path, "damaged", "data/0 are not those")


def test_a_file_larger_than_any_picture_is_opened(tmp_path):
    with (tmp_path / "a.pth").open("wb") as file:
        file.truncate(600 << 20)  # sparse
    refusal(tmp_path / "a.pth", "damaged", "is damaged")


def test_a_file_of_a_big_endian_machine_is_refused(tmp_path):
    saved(tmp_path / "a.pth")
    rewritten(tmp_path / "a.pth", lambda n, c: (n, b"big" if n.endswith("byteorder") else c))
    refusal(tmp_path / "a.pth", "unsupported", "big-endian")


def test_a_missing_entry_is_named(tmp_path):
    saved(tmp_path / "a.pth")
    rewritten(tmp_path / "a.pth", lambda n, c: None if n.endswith("data/0") else (n, c))
    refusal(tmp_path / "a.pth", "damaged", "no entry .*data/0")


def test_an_entry_that_is_shorter_than_its_tensor_is_refused(tmp_path):
    saved(tmp_path / "a.pth")
    rewritten(tmp_path / "a.pth", lambda n, c: (n, c[:-1] if n.endswith("data/0") else c))
    refusal(tmp_path / "a.pth", "damaged", "shorter")


@pytest.mark.parametrize("name", ["constants.pkl", "code/__torch__.py"])
def test_a_program_is_known_by_either_of_its_entries(tmp_path, name):
    saved(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{name}", b"")
    refusal(tmp_path / "a.pth", "unsupported", "TorchScript")


def test_a_zip_without_a_pickle_and_one_of_arrays_are_told_apart(tmp_path):
    for name, words in (("x.txt", "is a zip without"), ("x.npy", "is a NumPy archive")):
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            archive.writestr(name, b"x" * 99)
        refusal(tmp_path / "a.pth", "unknown_format", words)


def test_a_compressed_or_overlapping_zip_is_not_unpacked(tmp_path):
    path = tmp_path / "a.pth"
    content = saved(path)
    rewritten(path, lambda n, c: (n, c), compression=zipfile.ZIP_DEFLATED)
    refusal(path, "zip_bomb", "zip bomb")
    # Central directory: an uncompressed size beyond the file's.
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 20 : directory + 28] = struct.pack("<2I", 1 << 30, 1 << 30)
    path.write_bytes(content)
    refusal(path, "zip_bomb", f"of {len(content)} bytes.* claims 1073743")


def test_an_entry_beyond_the_file_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    content = saved(path)
    directory = content.index(b"PK\x01\x02", content.index(b"/data/0"))
    for _ in range(9):
        name = content[directory + 46 :][: content[directory + 28]]
        if name.endswith(b"/data/0"):
            break
        directory = content.index(b"PK\x01\x02", directory + 1)
    for offset in (len(content) - 30, len(content) - 27, len(content)):
        changed = bytearray(content)
        changed[directory + 42 : directory + 46] = struct.pack("<I", offset)
        path.write_bytes(changed)
        for checksums in (True, False):
            with pytest.raises(CheckpointError) as caught:
                read_checkpoint(path, checksums=checksums)
            assert caught.value.kind == "damaged"


def test_a_zip_whose_table_is_cut_off_or_broken_is_called_truncated(tmp_path):
    path = tmp_path / "a.pth"
    content = saved(path)
    path.write_bytes(content[:-1])
    refusal(path, "truncated", "truncated")
    content[content.index(b"PK\x01\x02")] ^= 1
    path.write_bytes(content)
    refusal(path, "truncated", "truncated")


@pytest.mark.parametrize("more", [-1, 1])
def test_a_legacy_storage_of_another_length_than_declared_is_refused(tmp_path, more):
    path = tmp_path / "a.pth"
    content = saved(path, zipped=False)
    at = content.index(struct.pack("<q", len(W)) + W.numpy().tobytes())
    content[at : at + 8] = struct.pack("<q", len(W) + more)
    path.write_bytes(content)
    refusal(path, "damaged", f"{len(W) + more} elements, {len(W)} expected")


@pytest.mark.parametrize(
    ("keys", "words"),
    [("0", "list of storages is malformed"), ([1.5], "malformed"), (["9"], "no tensor uses")],
)
def test_a_legacy_file_with_a_broken_list_of_storages_is_refused(tmp_path, keys, words):
    path = tmp_path / "a.pth"
    content = saved(path, zipped=False)
    data = content.index(struct.pack("<q", len(W)) + W.numpy().tobytes())
    file = io.BytesIO(content)
    for _ in ("mark", "protocol version", "system", "tree"):
        assert [*pickletools.genops(file)][-1][0].name == "STOP"
    start = file.tell()
    path.write_bytes(content[:start] + pickle.dumps(keys, 2) + content[data:])
    refusal(path, "damaged", words)


def test_legacy_tensors_with_one_storage_share_it(tmp_path):
    saved(tmp_path / "a.pth", zipped=False, tree={"w": W, "part": W[7:9]})
    read = read_checkpoint(tmp_path / "a.pth")
    read["w"][7] = -1
    assert read["part"].tolist() == [-1, 8]


def test_a_pickled_tensor_without_its_mark_is_refused(tmp_path):
    loads = b"ctorch.storage\n_load_from_bytes\n"
    inner = pickle.dumps(5, 2)
    body = b"U" + bytes([len(inner)]) + inner
    for argument, words in (
        (body, "bytes"),  # text of protocol 2
        (b"C" + bytes([len(inner)]) + inner, "PyTorch's mark"),
    ):
        (tmp_path / "a.pkl").write_bytes(b"\x80\x03}U\x01a" + loads + argument + b"\x85Rs.")
        refusal(tmp_path / "a.pkl", "damaged", words)


@pytest.mark.parametrize("value", [None, 1, 1.5, "x", b"x", 0x1950A86A20F9469CFC6C * 1.0])
def test_a_pickle_of_a_plain_value_is_no_checkpoint(tmp_path, value):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, 2))
    refusal(tmp_path / "a.pkl", "unknown_format", "no tensors")


def safetensors(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def test_safetensors_are_known_by_their_first_bytes_and_refused_when_cut_off(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "a"
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path.write_bytes(safetensors(header, data=struct.pack("<2f", 1, 2)))
    assert read_checkpoint(path)["a"].tolist() == [1, 2]
    path.write_bytes(safetensors(b"{}"))
    assert read_checkpoint(path) == {"__metadata__": {}}
    path.write_bytes(safetensors(header, data=b"\0" * 7))
    refusal(path, "truncated", "truncated")
    path.write_bytes(safetensors(header, length=len(header) + 1))
    refusal(path, "truncated", f"ends after {8 + len(header)} bytes")
    path.write_bytes(safetensors(header, length=1 << 32))  # no header is so long
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert caught.value.kind != "truncated"


class InPieces(io.BytesIO):
    """A file that gives at most three bytes at once, as a pipe may."""

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:3])


def test_a_tensor_is_read_whole_from_whatever_pieces():
    assert read_tensor(InPieces(bytes(range(10))), 8).tolist() == list(range(8))
    with pytest.raises(TruncatedError):
        read_tensor(InPieces(bytes(5)), 8)


def test_a_bounded_file_gives_exactly_what_is_asked_or_ends():
    file = BoundedFile(io.BytesIO(bytes(100_000)), 100_000)
    assert len(file.read(70_000)) == 70_000
    assert file.check(30_000) == 30_000
    for count in (30_001, 70_000, -1):
        with pytest.raises(EOFError):
            file.check(count)
    with pytest.raises(EOFError):
        file.read(30_001)
    assert len(BoundedFile(io.BytesIO(bytes(9)), 9).read(9)) == 9


def test_numbers_of_numpy_keep_their_value(tmp_path):
    values = {"a": np.float64(1.5), "b": np.int8(-3), "c": np.bool_(True), "d": np.complex64(2j)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(values, 2))
    assert read_checkpoint(tmp_path / "a.pkl") == {"a": 1.5, "b": -3, "c": True, "d": 2j}

"""Checkpoints: sealed, atomic, pruned, and never executed."""

import hashlib
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch

from moco_common import files
from moco_common.errors import UserError
from moco_common.reader import records
from pretrain.checkpoint import format as checkpoint


def content(step, size=3):
    weights = {"w": torch.ones(size) * step}
    return {"format": checkpoint.FORMAT, "step": step, "state_dict": weights}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_last_is_the_newest_and_old_ones_are_dropped(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(content(step), tmp_path, keep=2)
    assert names(tmp_path) == [
        "checkpoint_00000002.pth",
        "checkpoint_00000010.pth",
        "checkpoint_last.pth",
    ]
    loaded = checkpoint.load(tmp_path / checkpoint.LAST)
    assert loaded["step"] == 10
    assert loaded["state_dict"]["w"].tolist() == [10, 10, 10]


def test_a_run_that_was_set_back_keeps_its_new_checkpoints_and_the_later_ones(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(content(step), tmp_path, keep=3)
    checkpoint.save(content(15), tmp_path, keep=1)
    assert [path.name[-6:-4] for path in checkpoint.candidates(tmp_path)] == ["st", "30", "20"]
    assert checkpoint.load(tmp_path / checkpoint.LAST)["step"] == 15


def test_the_file_is_one_that_torch_and_zip_readers_read_and_its_seal_is_sha256(tmp_path):
    path = checkpoint.save(content(7), tmp_path)
    for mmap in (False, True):
        assert torch.load(str(path), weights_only=True, mmap=mmap)["step"] == 7
    archive = zipfile.ZipFile(path)
    assert archive.testzip() is None
    mark, _, seal = archive.comment.partition(b":")
    written = path.read_bytes()[: -len(archive.comment) - 2] + b"\0\0"
    assert mark == b"sha256"
    assert seal.decode() == hashlib.sha256(written).hexdigest()
    torch.save(torch.load(path, weights_only=True), plain := tmp_path / "plain.pth")
    assert zipfile.ZipFile(plain).namelist() == [
        name.replace("archive/", "plain/") for name in archive.namelist()
    ]


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = checkpoint.save(content(1, size=40), tmp_path)
    whole = path.read_bytes()
    assert checkpoint.load(path)["step"] == 1
    bits = random.Random(0)
    seal = range(len(whole) - 100, len(whole))
    for place in [*bits.sample(range(len(whole)), 300), *seal, 0, 1, 2, 3]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bits.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.DamagedError):
            checkpoint.load(path)
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(checkpoint.DamagedError):
            checkpoint.load(path)


def test_a_checkpoint_cut_to_any_length_is_damaged(tmp_path):
    path = checkpoint.save(content(1, size=20_000), tmp_path)
    whole = path.read_bytes()
    some = random.Random(1).sample(range(len(whole)), 300)
    pages, ends = range(4096, len(whole), 4096), range(len(whole) - 700, len(whole))
    for length in [*range(80), *pages, *some, *ends]:
        path.write_bytes(whole[:length])
        with pytest.raises(checkpoint.DamagedError, match="is damaged|lost its checksum"):
            checkpoint.load(path)


def test_what_a_run_goes_on_from_is_read_to_the_bit(tmp_path):
    shared = torch.randn(6, 4)
    state = {
        "bf16": torch.randn(7).bfloat16(),
        "transposed": torch.randn(3, 5).T,
        "every_second": torch.arange(10)[::2],
        "shared": shared,
        "view": shared[2:4],
        "empty": torch.empty(0, 3),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3, "none": None}
    whole = {
        **content(1),
        "state_dict": state,
        "scaler": scaler,
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "ranks": {"torch": torch.get_rng_state()[None]},
        "text": "\u00e9\n",
        "bytes": b"\x00\xff",
    }
    path = checkpoint.save(whole, tmp_path)
    ours, theirs = checkpoint.load(path), torch.load(path, weights_only=True)
    for name, tensor in theirs["state_dict"].items():
        read = ours["state_dict"][name]
        assert (read.dtype, read.shape, read.stride()) == (
            (tensor.dtype, tensor.shape, tensor.stride())
        ), name
        assert read.contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
    assert torch.equal(ours["ranks"]["torch"], theirs["ranks"]["torch"])
    for name in ("scaler", "optimizer", "text", "bytes", "step"):
        assert ours[name] == theirs[name]
        assert repr(ours[name]) == repr(theirs[name])  # 1 is not True, nor (1,) [1]
    ours["state_dict"]["shared"][2, 0] = 7  # what shared memory when saved still does
    assert ours["state_dict"]["view"][0, 0] == 7


def test_a_checkpoint_in_use_does_not_need_its_file(tmp_path):
    path = checkpoint.save(content(1, size=5000), tmp_path)
    state = checkpoint.load(path)
    path.open("wb").close()
    assert state["state_dict"]["w"].sum() == 5000


@pytest.mark.parametrize("failure", [TypeError, KeyError, MemoryError, KeyboardInterrupt])
def test_a_failure_that_is_not_the_files_is_no_damage(tmp_path, monkeypatch, failure):
    path = checkpoint.save(content(1), tmp_path)
    monkeypatch.setattr(records.TensorRecipe, "build", lambda _: (_ for _ in ()).throw(failure()))
    if failure is MemoryError:  # one sentence, and an earlier checkpoint would not help
        with pytest.raises(UserError, match="needs more memory than is free") as caught:
            checkpoint.load(path)
        assert not isinstance(caught.value, checkpoint.DamagedError)
    else:
        with pytest.raises(failure):
            checkpoint.load(path)


@pytest.mark.parametrize("fails", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_last_checkpoint_no_debris_and_one_sentence(
    tmp_path, monkeypatch, fails
):
    checkpoint.save(content(1), tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    if fails == "write":
        monkeypatch.setattr(checkpoint, "_Hashed", type("Full", (checkpoint._Hashed,), {}))
        original = checkpoint._Hashed.__init__

        def init(self, file):
            original(self, file)
            self.file = type("File", (), {"write": full, "flush": lambda _: None})()

        monkeypatch.setattr(checkpoint._Hashed, "__init__", init)
    else:
        monkeypatch.setattr(files.os, "fsync" if fails == "fsync" else "replace", full)
    with pytest.raises(UserError, match="No space left.*free some space and run the command again"):
        checkpoint.save(content(2), tmp_path)
    assert names(tmp_path) == ["checkpoint_00000001.pth", checkpoint.LAST]
    assert checkpoint.load(tmp_path / checkpoint.LAST)["step"] == 1


def test_a_file_system_without_links_gets_a_copy(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", no_links)
    checkpoint.save(content(3), tmp_path)
    assert checkpoint.load(tmp_path / checkpoint.LAST)["step"] == 3
    assert len(names(tmp_path)) == 2


def test_what_killed_writers_leave_is_removed_and_nothing_else(tmp_path):
    checkpoint.save(content(1), tmp_path)
    before = names(tmp_path)
    (tmp_path / ".checkpoint_00000002.pth.x1y2.part").write_bytes(b"half")
    (tmp_path / f".{checkpoint.LAST}.part").write_bytes(b"")
    files.remove_unfinished(tmp_path)
    assert names(tmp_path) == before


class Hostile:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_refused_and_executes_nothing(tmp_path, legacy):
    proof, path = tmp_path / "executed", tmp_path / "hostile.pth"
    if legacy:
        hostile = {"format": checkpoint.FORMAT, "x": Hostile(proof)}
        path.write_bytes(pickle.dumps(hostile, protocol=2))
    else:
        torch.save({"format": checkpoint.FORMAT, "x": Hostile(proof)}, path)
    with pytest.raises(UserError, match="was not read") as raised:
        checkpoint.load(path)
    # Not like damage, after which a run goes on from the checkpoint before: somebody put it there.
    assert not isinstance(raised.value, checkpoint.DamagedError)
    assert not proof.exists()


def test_a_missing_and_a_foreign_file_are_one_sentence_each(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "nowhere.pth")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="not a pre-training checkpoint"):
        checkpoint.load(tmp_path / "foreign.pth")

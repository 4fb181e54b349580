"""Checkpoints: atomic, pruned, and never executed."""

import pickle
from pathlib import Path

import pytest
import torch

from pretrain import checkpoint
from pretrain.errors import UserError


def content(step):
    return {"format": checkpoint.FORMAT, "step": step, "state_dict": {"w": torch.ones(3) * step}}


def test_last_is_the_newest_and_old_ones_are_dropped(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(content(step), tmp_path, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint_00000002.pth", "checkpoint_00000010.pth", checkpoint.LAST]
    loaded = checkpoint.load(tmp_path / checkpoint.LAST)
    assert loaded["step"] == 10
    assert loaded["state_dict"]["w"].tolist() == [10, 10, 10]


def test_a_failing_write_leaves_the_last_checkpoint_and_no_debris(tmp_path, monkeypatch):
    checkpoint.save(content(1), tmp_path)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(content(2), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint_00000001.pth", checkpoint.LAST]
    assert checkpoint.load(tmp_path / checkpoint.LAST)["step"] == 1


class Hostile:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_refused_and_executes_nothing(tmp_path, legacy):
    proof, path = tmp_path / "executed", tmp_path / "hostile.pth"
    if legacy:
        path.write_bytes(pickle.dumps({"format": checkpoint.FORMAT, "x": Hostile(proof)}))
    else:
        torch.save({"format": checkpoint.FORMAT, "x": Hostile(proof)}, path)
    with pytest.raises(UserError, match="was not read"):
        checkpoint.load(path)
    assert not proof.exists()


def test_a_truncated_a_missing_and_a_foreign_file_are_one_sentence_each(tmp_path):
    path = checkpoint.save(content(1), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "nowhere.pth")
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="not a pre-training checkpoint"):
        checkpoint.load(path)

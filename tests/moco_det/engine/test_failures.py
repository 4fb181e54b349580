"""A run that fails reports why: in one sentence where the user can act on it."""

import shutil

import pytest

from moco_det.engine.train_step import TrainStep
from tests.conftest import NARROW, QUICK
from tools.train_net import main


@pytest.fixture
def words(voc_dir, tmp_path):
    train = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval"]
    train += ["--output-dir", str(tmp_path / "run"), *NARROW, *QUICK]
    return [*train, "TEST.PRECISE_BN.ENABLED", "False"]


def raising(error):
    def step(self, iteration):
        raise error

    return step


@pytest.mark.parametrize("error", [RuntimeError("a GPU fell off"), KeyboardInterrupt("twice")])
def test_what_goes_wrong_in_the_first_iteration_is_not_hidden(words, monkeypatch, error):
    monkeypatch.setattr(TrainStep, "__call__", raising(error))
    monkeypatch.setattr("tools.train_net.run_tool", lambda work, again: work())
    with pytest.raises(type(error), match=str(error)):
        main(words)


def test_a_broken_image_in_the_first_batch_is_named(words, voc_dir, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(voc_dir, data)
    for image in data.glob("JPEGImages/*.jpg"):
        image.write_bytes(image.read_bytes()[:900])
    words = [word.replace(str(voc_dir), str(data)) for word in words]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot read {data}/JPEGImages/00000")
    assert error.count("\n") == 1


def test_a_failed_iteration_has_no_progress_line(words, monkeypatch, capsys):
    step = TrainStep.__call__

    def fails_at_1(self, iteration):
        if iteration:
            raise RuntimeError("at 1")
        return step(self, iteration)

    monkeypatch.setattr(TrainStep, "__call__", fails_at_1)
    with pytest.raises(RuntimeError, match="at 1"):
        main(words)
    out = capsys.readouterr().out
    assert "iter 1/2" in out
    assert "iter 2/2" not in out

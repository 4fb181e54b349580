"""Runs that an earlier version of the project wrote are resumed, converted, evaluated, reported."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from moco_common.files import link_file
from moco_common.reader.formats import read_checkpoint
from moco_det.conversion import convert
from pretrain.checkpoint import format as checkpoint
from tests.old_runs.digests import digest
from tests.pretrain.runs import TINY, run, write_photographs

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "pretrain/expected.json").read_text())
# Other versions of torch and other processors add in another order.
SAME_ARITHMETIC = (EXPECTED["torch"], EXPECTED["cpu"]) == (
    torch.__version__.split("+")[0],
    torch.backends.cpu.get_cpu_capability(),
)


def same(a, b):
    """Whether two dictionaries of tensors are equal to the bit where the arithmetic is."""
    assert list(a) == list(b)
    for name in a:
        if SAME_ARITHMETIC:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=1e-3, msg=name)


def test_a_pre_training_run_is_resumed_to_the_state_that_the_old_version_reached(tmp_path):
    shutil.copytree(HERE / "pretrain", tmp_path / "full")
    write_photographs(tmp_path / "photos")
    link_file(tmp_path / "full/checkpoint_00000003.pth", tmp_path / "full" / checkpoint.LAST)
    code, text = run("--data", "photos", "--output-dir", "full", "--resume", *TINY, PWD=tmp_path)
    assert code == 0, text
    lines = (tmp_path / "full/metrics.json").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx(EXPECTED["losses"], rel=0 if SAME_ARITHMETIC else 1e-2)
    state = checkpoint.load(tmp_path / "full/checkpoint_00000006.pth")
    if SAME_ARITHMETIC:
        assert {k: digest(state[k]) for k in EXPECTED["checkpoint_6"]} == EXPECTED["checkpoint_6"]


def test_a_pre_training_checkpoint_is_converted_to_the_same_tensors(tmp_path):
    convert(HERE / "pretrain/checkpoint_00000003.pth", output=tmp_path / "a.pkl")
    ours, theirs = (
        read_checkpoint(tmp_path / "a.pkl"),
        read_checkpoint(HERE / "pretrain/converted.pkl"),
    )
    assert list(ours["model"]) == list(theirs["model"])
    for name, tensor in theirs["model"].items():
        assert torch.equal(ours["model"][name], tensor), name
    assert ours["metadata"] == theirs["metadata"]


@pytest.fixture
def detection(tmp_path, voc_dir, monkeypatch):
    """The finished run in its own folder, beside the data that it was trained on."""
    shutil.copytree(HERE / "detection", tmp_path / "full")
    os.symlink(voc_dir, tmp_path / "voc")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "full"


def scores(folder):
    return json.loads((folder / "results.json").read_text())["bbox"]


def test_a_stopped_fine_tuning_run_is_resumed_to_the_weights_and_scores_of_the_whole_one(detection):
    from tools.train_net import main

    whole, before = read_checkpoint(HERE / "detection/model_final.pth"), scores(detection)
    (detection / "model_final.pth").unlink()
    (detection / "results.json").unlink()
    (detection / "last_checkpoint").write_text("model_0000197.pth")
    assert main(["--resume", "--output-dir", "full"]) == 0
    same(read_checkpoint(detection / "model_final.pth")["model"], whole["model"])
    if SAME_ARITHMETIC:
        assert scores(detection) == before


def test_a_finished_fine_tuning_run_is_evaluated_to_the_same_scores_and_reported(detection):
    from tools.report import main as report
    from tools.train_net import main

    before = scores(detection)
    (detection / "results.json").unlink()
    assert main(["--resume", "--eval-only", "--output-dir", "full"]) == 0
    assert scores(detection) == before
    assert before["AP"] == 30  # neither none nor all
    report(["full", "-o", "report"])
    assert "30.0" in Path("report/report.md").read_text()

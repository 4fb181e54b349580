"""What a run does with its plan: which weights are evaluated, what is refused, who may write."""

import json
import os
import shutil
import sys

import pytest
import torch

from moco_common.run_lock import RunLock
from tests.conftest import NARROW, QUICK
from tools.train_net import main


@pytest.fixture(scope="module")
def finished(voc_dir, tmp_path_factory):
    """A run of one iteration, evaluated."""
    run = tmp_path_factory.mktemp("finished") / "run"
    data = ["--train-data", f"voc:{voc_dir}:trainval", "--test-data", f"voc:{voc_dir}:test"]
    args = ["--config", "VOC-random", *data, "--output-dir", str(run), *NARROW, *QUICK]
    assert main([*args, "SOLVER.MAX_ITER", "1", "TEST.PRECISE_BN.ENABLED", "False"]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def evaluated(run, *overrides):
    (run / "results.json").unlink()
    assert main(["--eval-only", "--output-dir", str(run), *map(str, overrides)]) == 0
    return json.loads((run / "results.json").read_text())


def test_the_runs_newest_weights_are_evaluated_unless_others_are_named(run, tmp_path, capsys):
    newest = run / "model_final.pth"
    assert evaluated(run)["iteration"] == 1
    assert f"loaded     {newest}: the whole detector" in capsys.readouterr().out

    other = torch.load(newest, weights_only=True)
    torch.save({"model": other["model"], "iteration": 41}, tmp_path / "other.pth")
    results = evaluated(run, "MODEL.WEIGHTS", tmp_path / "other.pth")
    assert (results["iteration"], results["weights"]) == (42, str(tmp_path / "other.pth"))
    assert f"loaded     {tmp_path / 'other.pth'}: the whole" in capsys.readouterr().out

    torch.save({"model": other["model"]}, tmp_path / "bare.pth")
    assert evaluated(run, "MODEL.WEIGHTS", tmp_path / "bare.pth")["iteration"] is None


def test_without_a_detector_there_is_nothing_to_evaluate(run, weights_file, capsys):
    for file in [*run.glob("*.pth"), run / "last_checkpoint"]:
        file.unlink()
    for overrides in ([], ["MODEL.WEIGHTS", str(weights_file)]):
        assert main(["--eval-only", "--output-dir", str(run), *overrides]) == 1
        error = capsys.readouterr().err
        assert "nothing to evaluate" in error
        assert error.count("\n") == 1


def test_evaluation_writes_no_word_into_the_runs_record(run):
    kept = {p: p.read_bytes() for p in run.iterdir() if p.name in ("config.yaml", "findings.json")}
    assert len(kept) == 2
    evaluated(run)
    assert {path: path.read_bytes() for path in kept} == kept


def test_an_unknown_preflight_is_refused_with_the_names(voc_dir, tmp_path, capsys):
    args = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval", *NARROW, *QUICK]
    assert main([*args, "--output-dir", str(tmp_path / "run"), "PREFLIGHT", "sometimes"]) == 1
    error = capsys.readouterr().err
    assert "PREFLIGHT 'sometimes' is unknown: choose one of auto, always, only, never" in error
    assert not list((tmp_path / "run").glob("*.pth"))


def test_training_is_refused_where_another_process_trains_and_evaluation_is_not(
    run, voc_dir, capsys
):
    def in_another_process(*words):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os._exit(main([*map(str, words)]))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    (run / "results.json").unlink()
    (run / "model_final.pth").rename(run / "model_0000000.pth")
    (run / "last_checkpoint").write_text("model_0000000.pth")
    with RunLock(run):
        assert in_another_process("--resume", "--output-dir", run) == 1
        assert in_another_process("--eval-only", "--output-dir", run) == 0
    assert (run / "results.json").is_file()


def test_new_layers_are_drawn_by_the_seed(voc_dir, tmp_path):
    """At a learning rate of 0 the weights at the end are those of the start."""
    args = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval", *NARROW, *QUICK]
    args += ["SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "0.0", "TEST.PRECISE_BN.ENABLED", "False"]
    drawn = []
    for i, seed in enumerate(("5", "6", "5")):
        assert main([*args, "--output-dir", str(tmp_path / str(i)), "SEED", seed]) == 0
        state = torch.load(tmp_path / str(i) / "model_final.pth", weights_only=True)["model"]
        drawn.append(state["roi_heads.box_predictor.cls_score.weight"])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])

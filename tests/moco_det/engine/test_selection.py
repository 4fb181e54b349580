"""The best checkpoint, early stopping and the moving average, also where a run was interrupted."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from moco_common.errors import UserError
from moco_det.engine import trainer
from moco_det.engine.selection import Selection
from moco_det.engine.train_step import TrainStep
from moco_det.report.build import build_report
from moco_det.report.runs import read_runs
from tests.conftest import NARROW, QUICK
from tests.moco_det.engine.test_resume import assert_same, meanwhile
from tools.train_net import main

SETTINGS = [
    *(*NARROW, *QUICK, "SOLVER.MAX_ITER", "9", "SOLVER.CHECKPOINT_PERIOD", "3"),
    *("SOLVER.WARMUP_ITERS", "2", "TEST.EVAL_PERIOD", "2", "SOLVER.BASE_LR", "0.002"),
    *("TEST.PRECISE_BN.NUM_ITER", "1"),
]
FILES = ("model_final.pth", "model_best.pth", "model_ema.pth")


def command(voc_dir, folder, *overrides):
    data = ["--train-data", f"voc:{voc_dir}:trainval", "--test-data", f"voc:{voc_dir}:test"]
    return ["--config", "VOC-random", *data, "--output-dir", str(folder), *SETTINGS, *overrides]


def load(folder, name):
    return torch.load(folder / name, weights_only=True)


def results(folder):
    record = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in record.items() if key != "commit"}


@pytest.fixture
def scores_of_weights(monkeypatch):
    """An AP that is a pseudo-random function of the weights, statistics of BN included."""

    def scores(cfg, model, name, predictions):
        total = sum(v.double().sum().item() for v in model.state_dict().values())
        value = total * 1e7 % 100
        return {"bbox": {"AP": value, "AP50": value / 2, "per_class": {}}}, ""

    monkeypatch.setattr(trainer, "_scores", scores)


def script(monkeypatch, *values):
    """An AP of these values, evaluation by evaluation."""
    left = list(values)
    monkeypatch.setattr(trainer, "_scores", lambda *_: ({"bbox": {"AP": left.pop(0)}}, ""))


@pytest.mark.parametrize("metric", ["bbox/AP", "bbox_ema/AP50"])
def test_an_interrupted_run_selects_what_the_whole_one_selects(
    metric, voc_dir, tmp_path, scores_of_weights, monkeypatch
):
    """Stopped by a signal, and crashed in an evaluation, after the checkpoint before it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["TEST.BEST_METRIC", metric, "SOLVER.EMA_DECAY", "0.7", "TEST.EVAL_PERIOD", "3"]
    assert main(command(voc_dir, whole, *more)) == 0

    meanwhile(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(command(voc_dir, parts, *more)) == 143
    resume = ["--resume", "--output-dir", str(parts)]
    scores = trainer._scores

    def crash(*arguments):
        monkeypatch.setattr(trainer, "_scores", scores)
        raise RuntimeError("a GPU fell off the bus")

    monkeypatch.setattr(trainer, "_scores", crash)
    with pytest.raises(RuntimeError, match="fell off"):
        main(resume)  # in the evaluation after iteration 3, whose checkpoint is written
    assert main(resume) == 0
    for name in FILES:
        assert_same(load(parts, name), load(whole, name))
    assert results(parts) == results(whole)
    evaluated = [
        {**json.loads(line), "iteration": json.loads(line)["iteration"] + 1}
        for line in (whole / "metrics.json").read_text().splitlines()
        if metric in json.loads(line)
    ]
    best = max(evaluated, key=lambda line: line[metric])
    assert results(whole)["best_metric"] == metric
    assert results(whole)["best_value"] == pytest.approx(best[metric])
    assert load(whole, "model_best.pth")["best_value"] == pytest.approx(best[metric])
    assert main(resume) == 0  # a finished run is evaluated again, with the same outcome
    assert results(parts) == results(whole)


def test_the_best_checkpoint_holds_the_weights_of_the_best_evaluation(
    voc_dir, tmp_path, monkeypatch
):
    script(monkeypatch, 10.0, 30.0, 20.0, math.nan, 25.0)
    period = ["SOLVER.CHECKPOINT_PERIOD", "1"]
    assert main(command(voc_dir, tmp_path, "TEST.BEST_METRIC", "bbox/AP", *period)) == 0
    best = load(tmp_path, "model_best.pth")
    assert_same(best["model"], load(tmp_path, "model_0000003.pth")["model"])  # 4 iterations
    record = results(tmp_path)
    assert (record["best_value"], record["best_iteration"]) == (30.0, 4)
    assert (record["bbox"]["AP"], record["iteration"]) == (25.0, 9)  # the last remains the result
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_run_that_stagnates_stops_and_goes_on_with_more_patience(
    voc_dir, tmp_path, monkeypatch, capsys
):
    script(monkeypatch, 10.0, 30.0, 20.0, 29.0)
    patience = ["TEST.BEST_METRIC", "bbox/AP", "TEST.PATIENCE", "2", "SOLVER.MAX_ITER", "20"]
    command_line = command(voc_dir, tmp_path / "run", *patience)
    assert main(command_line) == 0
    assert (
        "early stop after iteration 8: 2 evaluations without a better bbox/AP than 30.00 "
        "(iteration 4, in model_best.pth)"
    ) in capsys.readouterr().out
    assert load(tmp_path / "run", "model_final.pth")["iteration"] == 7
    assert results(tmp_path / "run")["iteration"] == 8
    assert results(tmp_path / "run")["best_iteration"] == 4
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == 7

    before = load(tmp_path / "run", "model_final.pth")
    script(monkeypatch, 29.0)
    assert main([*command_line, "--resume"]) == 0  # evaluated again, not trained
    assert_same(load(tmp_path / "run", "model_final.pth"), before)
    script(monkeypatch, 31.0, *(5.0,) * 5)
    assert main([*command_line, "--resume", "TEST.PATIENCE", "4"]) == 0
    assert load(tmp_path / "run", "model_final.pth")["iteration"] == 17
    assert results(tmp_path / "run")["best_iteration"] == 10


def test_the_average_is_that_of_the_recurrence(voc_dir, tmp_path, monkeypatch):
    """m_1 = w_1; m_t = d m_(t-1) + (1 - d) w_t with d = min(decay, t / (9 + t))."""
    seen = []
    step = TrainStep.__call__

    def noted(self, iteration):
        done = step(self, iteration)
        seen.append({k: v.detach().double().numpy() for k, v in self.model.named_parameters()})
        seen[-1] = {k: np.copy(v) for k, v in seen[-1].items()}
        return done

    monkeypatch.setattr(TrainStep, "__call__", noted)
    script(monkeypatch, *(1.0,) * 10)
    assert (
        main(command(voc_dir, tmp_path, "SOLVER.EMA_DECAY", "0.3", "SOLVER.BASE_LR", "0.02")) == 0
    )
    found, final = load(tmp_path, "model_ema.pth"), load(tmp_path, "model_final.pth")
    assert len(seen) == 9
    for name, expected in seen[0].items():
        for t, weights in enumerate(seen[1:], 2):
            d = min(0.3, t / (9 + t))
            expected = d * expected + (1 - d) * weights[name]
        np.testing.assert_allclose(found["model"][name].numpy(), expected, rtol=1e-4, atol=1e-7)
    names = [n for n in final["model"] if n.endswith("running_var")]
    assert any(not torch.equal(found["model"][n], final["model"][n]) for n in names)


def test_both_ap_are_in_the_record_and_in_the_table(voc_dir, tmp_path):
    assert main(command(voc_dir, tmp_path / "run", "SOLVER.EMA_DECAY", "0.5")) == 0
    record = results(tmp_path / "run")
    assert record["bbox"].keys() == record["bbox_ema"].keys()
    assert "AP (EMA)" in build_report(read_runs([tmp_path / "run"])).text()
    ema = ["MODEL.WEIGHTS", str(tmp_path / "run" / "model_ema.pth")]
    config = str(tmp_path / "run" / "config.yaml")
    alone = ["--config", config, "--eval-only", "--output-dir", str(tmp_path / "ema"), *ema]
    assert main(alone) == 0
    assert results(tmp_path / "ema")["bbox"] == record["bbox_ema"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["TEST.PATIENCE", "2"], "set TEST.BEST_METRIC"),
        (["TEST.BEST_METRIC", "bbox/AP", "TEST.PATIENCE", "1", "TEST.EVAL_PERIOD", "0"], "EVAL"),
        (["TEST.PATIENCE", "-1"], "TEST.PATIENCE is -1"),
        (["TEST.BEST_METRIC", "AP"], "write TASK/METRIC"),
        (["TEST.BEST_METRIC", "bbox_ema/AP"], "needs a moving average"),
        (["SOLVER.EMA_DECAY", "1.0"], "SOLVER.EMA_DECAY is 1.0"),
    ],
)
def test_contradictions_are_refused_before_training(overrides, message, voc_dir, tmp_path, capsys):
    assert main(command(voc_dir, tmp_path / "run", *overrides)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_metric_is_named_with_those_that_exist():
    selection = Selection("bbox/APP", 0, lambda *_, **__: None)
    with pytest.raises(UserError, match="bbox/APP is no metric .* one of bbox/AP, bbox/AP50"):
        selection.update(2, {"bbox": {"AP": 1.0, "AP50": 2.0, "per_class": {}}})

"""A run that was interrupted and goes on is, bit for bit, the run that was not."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from moco_common.stopping import Stopped, StopRequest
from moco_det.engine import train_net as launch
from moco_det.engine.hooks import truncate_metrics
from moco_det.engine.setup import Options, prepare
from moco_det.engine.train_step import TrainStep
from tests.conftest import NARROW, QUICK
from tests.moco_det.ranks import on_ranks
from tools.train_net import main

SETTINGS = [
    *(*NARROW, *QUICK, "SOLVER.MAX_ITER", "5", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("SOLVER.STEPS", "(3,)", "SOLVER.WARMUP_ITERS", "2", "DATALOADER.NUM_WORKERS", "2"),
    *("TEST.EVAL_PERIOD", "2", "SOLVER.ACCUMULATION_STEPS", "2", "SOLVER.BASE_LR", "0.002"),
]
QUICKER = [
    *("SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)", "SOLVER.ACCUMULATION_STEPS", "1"),
    *("TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "1"),
]


def final(folder):
    return torch.load(Path(folder, "model_final.pth"), weights_only=True)


def assert_same(a, b, at=""):
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert list(a) == list(b), at
        for key in a:
            assert_same(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}/{i}")
    else:
        assert a == b, at


def rates(folder):
    """Of all iterations. (Losses are medians over those since the start, so they may differ.)"""
    lines = [json.loads(line) for line in Path(folder, "metrics.json").read_text().splitlines()]
    return [(x["iteration"], x["lr"]) for x in lines if "total_loss" in x]


def meanwhile(iteration, what):
    """Do something in the middle of an iteration, once."""
    step = TrainStep.__call__

    def interrupted(self, at):
        done = step(self, at)
        if at == iteration:
            TrainStep.__call__ = step
            what()
        return done

    TrainStep.__call__ = interrupted


def test_a_stopped_a_crashed_and_a_damaged_run_end_as_the_whole_one(voc_dir, tmp_path, capsys):
    """Learning rates, losses, weights, BN statistics, momentum and scheduler are compared; the
    loader has workers, and PreciseBN ran in between."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval", *SETTINGS]
    assert main([*train, "--output-dir", str(whole)]) == 0
    resume = ["--resume", "--output-dir", str(parts)]

    meanwhile(0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*train, "--output-dir", str(parts)]) == 143
    stop = "stopped    after iteration 1, saved: continue with --resume"
    assert capsys.readouterr().err.splitlines()[-1] == stop
    assert (parts / "log.txt").read_text().splitlines()[-1].endswith(stop)  # no line after it
    assert (parts / "last_checkpoint").read_text() == "model_0000000.pth"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def crash():
        raise RuntimeError("a GPU fell off the bus")

    meanwhile(2, crash)
    with pytest.raises(RuntimeError, match="fell off"):
        main(resume)
    with (parts / "metrics.json").open("a") as file:
        file.write('{"iteration": 2, "total_l')  # as a crash leaves it
    assert main(resume) == 0
    assert_same(final(parts), final(whole))
    assert rates(parts) == rates(whole)

    (parts / "model_final.pth").write_bytes((parts / "model_final.pth").read_bytes()[:-5000])
    capsys.readouterr()
    assert main(resume) == 0
    said, warned = capsys.readouterr()
    assert "warning: skipped: " in warned
    assert "resumed    at iteration 4 of 5" in said
    assert_same(final(parts), final(whole))
    assert rates(parts) == rates(whole)


def on_a_rank(rank, spec, folder):
    """Three runs on two ranks: whole; stopped by a signal to the second rank only; gone on."""

    def plan(name, resume=False):
        options = Options(
            config="VOC-random",
            train_data=[spec],
            num_gpus=2,
            output_dir=str(Path(folder, name)),
            resume=resume,
            overrides=[*SETTINGS, *QUICKER],
        )
        return prepare(options)

    launch.run(plan("whole"))
    parts = plan("parts")
    if rank == 1:
        meanwhile(0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        launch.run(parts)
    except Stopped as stopped:
        code = stopped.exit_status
    else:
        code = 0
    torch.distributed.barrier()
    launch.run(plan("parts", resume=True))
    return code


def test_two_ranks_stop_together_and_go_on_exactly(voc_dir, tmp_path):
    codes = on_ranks(2, on_a_rank, f"voc:{voc_dir}:trainval", str(tmp_path))
    assert codes == [143, 143]
    # The ranks learn of the signal one iteration later: their vote runs behind it.
    assert [p.name for p in (tmp_path / "parts").glob("model_0*")] == ["model_0000001.pth"]
    assert_same(final(tmp_path / "parts"), final(tmp_path / "whole"))


def test_weights_that_are_not_finite_are_not_saved(voc_dir, tmp_path, capsys, monkeypatch):
    step = TrainStep.__call__

    def poison(self, iteration):
        done = step(self, iteration)
        with torch.no_grad():
            next(self.model.parameters()).fill_(float("nan"))
        return done

    monkeypatch.setattr(TrainStep, "__call__", poison)
    args = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval", *NARROW, *QUICK]
    args += ["TEST.PRECISE_BN.ENABLED", "False", "SOLVER.MAX_ITER", "1"]
    assert main([*args, "--output-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: backbone.stem.conv1.weight is not finite after iteration 1")
    assert not list((tmp_path / "run").glob("*.pth"))


def test_a_second_ctrl_c_is_obeyed_at_once():
    stop = StopRequest()
    with stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with stop, pytest.raises(Stopped) as stopped:
        stop.obey()
    assert stopped.value.exit_status == 130


def test_lines_that_will_be_written_again_are_dropped(tmp_path):
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"iteration": 1, "a": 2}\n{"iteration": 4}\n{"a": 1}\n[1]\n{"iterat')
    truncate_metrics(metrics, 4)
    assert metrics.read_text() == '{"iteration": 1, "a": 2}\n'
    truncate_metrics(tmp_path / "none.json", 4)

"""What each hook does after which iteration, on the smallest trainer."""

import errno
import json
import logging
import signal
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from torch import nn

from moco_common.errors import Stopped, UserError
from moco_common.stopping import StopRequest
from moco_det.checkpoint.run_checkpointer import RunCheckpointer
from moco_det.engine.hooks import (
    Checkpoints,
    Evaluation,
    PreciseBN,
    Writers,
    is_due,
    truncate_metrics,
)


def iterations(hook, last, start=0):
    """Run the hook after each iteration, as a trainer does; its storage at the end."""
    with EventStorage(start) as storage:
        hook.trainer = SimpleNamespace(iter=start, max_iter=last, storage=storage)
        for iteration in range(start, last):
            hook.trainer.iter = storage.iter = iteration
            hook.after_step()
        hook.trainer.iter = last
        hook.after_train()
    return storage


@pytest.mark.parametrize(
    ("period", "due"), [(0, [6]), (-1, [6]), (1, [0, 1, 2, 3, 4, 5, 6]), (3, [2, 5, 6]), (7, [6])]
)
def test_something_periodic_is_due_after_each_period_and_at_the_end(period, due):
    assert [i for i in range(7) if is_due(i, period, 7)] == due
    assert is_due(9, 4, 7)


class Noisy(nn.Module):
    """Batch norm of its input plus noise."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, batch):
        get_event_storage().put_scalar("of the model", 1.0)
        return self.norm(batch + torch.randn(batch.shape))


def precise(model, seed=0, period=2):
    batches = [torch.full((2, 1, 2, 2), 10.0 * n) for n in range(3)]
    return PreciseBN(period, model, lambda: iter(enumerate(batches)), seed=seed, images=6)


def test_precise_statistics_are_those_of_the_batches_with_the_same_noise_each_time(caplog):
    means = []
    for seed in (0, 0, 1):
        model = Noisy()
        with caplog.at_level(logging.INFO):
            storage = iterations(precise(model, seed), last=1)
        assert not storage.latest()  # the model's own events are not training's
        assert 9 < model.norm.running_mean.item() < 11
        assert 60 < model.norm.running_var.item() < 73
        means.append(model.norm.running_mean.item())
        torch.rand(5)
    assert means[0] == means[1] != means[2]
    assert "precise BN over 6 images" in caplog.text


def test_precise_statistics_come_before_every_evaluation_and_last_after_training(monkeypatch):
    hook, updated = precise(Noisy()), []
    monkeypatch.setattr(hook, "update_stats", lambda: updated.append(hook.trainer.iter))
    iterations(hook, last=5)
    assert updated == [1, 3, 4]


def test_a_model_without_batch_norm_is_not_run():
    def no_batches():
        raise AssertionError("asked for")

    hook = PreciseBN(0, nn.Linear(1, 1), no_batches, seed=0, images=1)
    iterations(hook, last=1)


class Saved(RunCheckpointer):
    def __init__(self, model, folder):
        super().__init__(model, str(folder))
        self.saved = {}

    def save(self, name, **state):
        self.saved[name] = state
        super().save(name, **state)


def test_checkpoints_are_named_by_iteration_and_the_last_is_final(tmp_path):
    checkpointer = Saved(nn.Linear(1, 1), tmp_path)
    iterations(Checkpoints(checkpointer, 2, StopRequest()), last=5)
    assert checkpointer.saved == {
        "model_0000001": {"iteration": 1},
        "model_0000003": {"iteration": 3},
        "model_final": {"iteration": 4},
    }
    assert (tmp_path / "model_final.pth").is_file()


def test_a_run_that_is_asked_to_stop_saves_first_and_then_stops(tmp_path, monkeypatch):
    checkpointer, stop = Saved(nn.Linear(1, 1), tmp_path), StopRequest()
    finished = []
    monkeypatch.setattr(stop, "finish", lambda: finished.append(dict(checkpointer.saved)))
    stop.signal = signal.SIGTERM
    with pytest.raises(Stopped) as stopped:
        iterations(Checkpoints(checkpointer, 100, stop), last=50, start=3)
    assert stopped.value.signal == signal.SIGTERM
    assert finished == [{"model_0000003": {"iteration": 3}}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    model = nn.BatchNorm1d(2)  # with a counter, which is an integer
    checkpointer = Saved(model, tmp_path)
    hook = Checkpoints(checkpointer, 1, StopRequest())
    iterations(hook, last=1)
    model.bias.data[1] = value
    with pytest.raises(UserError, match="bias is not finite after iteration 3, .*SOLVER.BASE_LR"):
        iterations(hook, last=9, start=2)
    assert list(checkpointer.saved) == ["model_final"]


class Writer(EventWriter):
    def __init__(self, error=None):
        self.error, self.calls = error, []

    def write(self):
        self.calls.append("write")
        if self.error is not None:
            raise self.error

    def close(self):
        self.calls.append("close")


def test_writers_write_every_period_and_at_the_end_and_are_closed(tmp_path):
    writers = [Writer(), Writer()]
    iterations(Writers(writers, 2, tmp_path), last=5)
    assert [w.calls for w in writers] == [["write", "write", "write", "write", "close"]] * 2


def test_a_full_disk_is_one_sentence_and_all_writers_are_closed(tmp_path):
    writers = [Writer(OSError(errno.ENOSPC, "")), Writer()]
    hook = Writers(writers, 2, tmp_path)
    for action in (lambda: iterations(hook, last=5), hook.after_train):
        with pytest.raises(UserError, match="free some space"):
            action()
    assert [w.calls[-1] for w in writers] == ["close", "close"]


def test_evaluation_records_its_numbers_between_and_after_training(monkeypatch):
    evaluated = []
    results = {"bbox": {"AP": 1.5, "name": "x", "flag": True, "part": {"AP50": 2}}, "speed": 3}

    def evaluate(done):
        evaluated.append(done)
        return results

    stop = StopRequest()
    hook = Evaluation(2, evaluate, stop)
    obeyed = []
    monkeypatch.setattr(stop, "obey", lambda: obeyed.append(list(evaluated)))
    storage = iterations(hook, last=6)
    assert evaluated == [2, 4, 6]  # the last is that of after_train, once
    assert obeyed == [[2, 4]]
    found = {name: value for name, (value, _) in storage.latest().items()}
    assert found == {"bbox/AP": 1.5, "bbox/part/AP50": 2.0, "speed": 3.0}
    assert not any(storage.smoothing_hints().values())


@pytest.mark.parametrize(("period", "expected"), [(0, [3]), (1, [1, 2, 3]), (3, [3]), (4, [3])])
def test_evaluation_after_training_takes_the_place_of_the_last_one(period, expected):
    evaluated = []

    def evaluate(done):
        evaluated.append(done)
        return {}

    hook = Evaluation(period, evaluate, StopRequest())
    iterations(hook, last=3)
    assert evaluated == expected


def test_an_interrupted_run_is_not_evaluated():
    hook = Evaluation(1, lambda done: pytest.fail("evaluated"), StopRequest())
    hook.trainer = SimpleNamespace(iter=4, max_iter=5)
    hook.after_train()


def test_a_resumed_run_writes_its_lines_again_and_no_half_line_stays(tmp_path):
    path = tmp_path / "metrics.json"
    truncate_metrics(path, 3)
    assert not path.exists()
    lines = [json.dumps({"iteration": i, "x": i}) for i in (1, 2, 3, 4)]
    path.write_text("\n".join([*lines, "[]", '{"x": 1}', '{"iteration": 1, "x']))
    truncate_metrics(path, 3)
    assert path.read_text() == "\n".join([*lines[:2], ""])

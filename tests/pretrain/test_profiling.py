"""The stage clock against sleeps of known length, and the profiler on a real step."""

import json
import time

import pytest
import torch

from moco_common.errors import UserError
from pretrain.profiling import Profiler, StageClock, stage
from tests.pretrain.engine.test_train_step import BATCH, LR, Stem, make, views

TICK = 0.02


@pytest.fixture
def ticks(monkeypatch):
    """A clock that only moves when told to."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def tick(count):
        now[0] += count

    return tick


def test_a_stage_is_charged_for_its_own_time_only(ticks):
    with stage("encoders: before the clock"):
        ticks(100)
    clock = StageClock()
    for _ in range(2):
        with clock:
            ticks(1)
            with stage("encoders: forward"):
                ticks(2)
                with stage("communication: shuffle"):
                    ticks(3)
                ticks(4)
            with stage("machinery: loss"):
                ticks(5)
        ticks(100)
    assert clock.seconds == {
        "encoders: forward": 12,
        "communication: shuffle": 6,
        "machinery: loss": 10,
    }
    assert clock.total == 30
    assert clock.share("encoders") == pytest.approx(12 / 30)
    assert clock.share("data") == 0
    rows = [line.split() for line in clock.table(steps=2).splitlines()]
    assert [(row[0], float(row[-3]), row[-1]) for row in rows] == [
        ("encoders:", 6000, "40.00%"),
        ("machinery:", 5000, "33.33%"),
        ("communication:", 3000, "20.00%"),
        ("rest:", 1000, "6.67%"),
        ("step", 15000, "100.00%"),
    ]


def test_a_stage_that_fails_is_closed(ticks):
    @stage("machinery: loss")
    def fail():
        ticks(1)
        raise ValueError("no")

    clock = StageClock()
    with clock:
        with pytest.raises(ValueError, match="no"):
            fail()
        ticks(5)
    assert clock.seconds == {"machinery: loss": 1}
    assert clock.total == 6


def profiled_run(folder, steps, total):
    """What is said of a run of ``total`` steps of MoCo whose batches come late."""
    lines = []
    profiler = Profiler(folder, steps, warmup=1, say=lines.append)
    take_step = make(Stem)
    watched = profiler.watch_step(take_step)

    def batches():
        for step in range(total):
            time.sleep(TICK)
            yield views(step)

    losses = [
        watched(batch, torch.arange(BATCH), step, LR)["loss"]
        for step, batch in enumerate(profiler.watch_data(batches()))
    ]
    plain = make(Stem)
    for step, loss in enumerate(losses):  # watched steps are the same steps, all of them
        assert torch.equal(plain(views(step), torch.arange(BATCH), step, LR)["loss"], loss)
    assert len(losses) == total
    return profiler, "\n".join(lines)


@pytest.mark.parametrize("total", [7, 9])  # ends with the profile, or goes on after it
def test_the_profiler_tells_where_steps_go_and_writes_their_trace(tmp_path, total):
    profiler, text = profiled_run(tmp_path / "run", steps=3, total=total)
    assert profiler.clock.seconds["data: waiting"] >= 3 * TICK
    names = [
        "data: waiting",
        "encoders: forward q",
        "encoders: forward k",
        "encoders: backward",
        "machinery: momentum update",
        "machinery: loss",
        "machinery: enqueue",
        "machinery: optimiser",
        "communication: shuffle",
        "communication: unshuffle",
        "communication: gather",
        "rest: outside all stages",
    ]
    for name in names:
        assert text.count(name) == 1, text
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["trace.json"]
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    labels = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    for name in names[:-1]:
        assert labels.count(name) == 3, name
    assert any(e["name"] == "aten::convolution" for e in events)


def test_a_run_too_short_to_profile_is_told(tmp_path):
    _, text = profiled_run(tmp_path, steps=3, total=5)
    assert text == (
        "warning: --profile 3 reports nothing, because it needs 7 iterations and the run ended "
        "after 5"
    )
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--profile 0 profiles nothing"):
        Profiler(tmp_path, 0)

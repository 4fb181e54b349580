"""What a run says: pace, time left, and one record of one run."""

import io
import json

import pytest

from pretrain.engine.progress import Progress


class Clock:
    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def after(self, seconds):
        self.seconds += seconds


def lines(stream):
    return stream.getvalue().splitlines()


def left(line):
    """Seconds of its eta."""
    parts = [float(part) for part in line.split("eta ")[1].split(":")]
    return sum(part * 60**i for i, part in enumerate(reversed(parts)))


def test_the_time_left_leaves_out_the_start_and_evaluations(tmp_path):
    """Half a second a step, 90 s of start-up, evaluations of 100 s: right after one minute."""
    now, out = Clock(), io.StringIO()
    progress = Progress(tmp_path, start=40, total=1040, batch_size=8, stream=out, now=now)
    now.after(90)
    progress.begin(41)
    for step in range(42, 182):
        now.after(0.5)
        if step % 60 == 0:
            with progress.pause():
                now.after(100)
        if step % 20 == 0:
            progress.log(step, "", loss=1.0)
    progress.close()
    for line, step in zip(lines(out), range(60, 182, 20), strict=True):
        assert left(line) == pytest.approx((1040 - step) * 0.5, abs=1)
        assert " 16 images/s" in line


def test_the_time_left_follows_a_pace_that_changes(tmp_path):
    now, out = Clock(), io.StringIO()
    progress = Progress(tmp_path, start=0, total=10_000, batch_size=8, stream=out, now=now)
    for step in range(20, 2020, 20):
        now.after(20 * (0.1 if step <= 1000 else 0.4))
        progress.log(step, "", loss=1.0)
    progress.close()
    assert left(lines(out)[-1]) == pytest.approx(8000 * 0.4, rel=0.05)


def test_metrics_of_steps_that_will_be_done_again_are_dropped_with_half_lines(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("".join(f'{{"iteration": {i}, "loss": 1.0}}\n' for i in range(5)) + '{"iter')
    progress = Progress(tmp_path, start=3, total=9, batch_size=8, quiet=True)
    progress.log(4, "", loss=2.0)
    progress.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2, 3, 4]
    assert records[-1]["loss"] == 2.0


def test_a_quiet_run_prints_warnings_only(tmp_path, capsys):
    progress = Progress(tmp_path, start=0, total=9, batch_size=8, quiet=True)
    progress.log(1, "", loss=2.0)
    progress.say("hello")
    progress.warn("mind this")
    progress.close()
    assert capsys.readouterr() == ("", "warning: mind this\n")

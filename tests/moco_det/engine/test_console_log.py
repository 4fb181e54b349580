"""What fine-tuning says while it goes: the time left, and how much of it where."""

import logging

import pytest
from detectron2.utils.events import EventStorage

from moco_det.engine.console_log import ProgressPrinter, log, logging_to, printing_to_log


@pytest.mark.parametrize("paces", [(0.5, 0.5), (0.5, 0.6)])
def test_the_time_left_is_right_within_a_fifth_after_the_first_minute(caplog, paces):
    """Two minutes at one pace, then at another: each line against what will really be left."""
    total, done = 600, []
    with caplog.at_level(logging.INFO, "moco_det"), EventStorage(0) as storage:
        printer = ProgressPrinter(total)
        for i in range(total):
            storage.iter = i
            seconds = paces[i >= 240]
            done.append(seconds)
            storage.put_scalars(total_loss=1.0, lr=0.1)
            if i >= 3:  # Detectron2's timer leaves out the first
                storage.put_scalar("time", seconds, smoothing_hint=False)
            if (i + 1) % 20 == 0:
                printer.write()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == total // 20
    for line, i in zip(lines, range(20, total + 1, 20), strict=True):
        clock = line.split("eta ")[1].split()[0]
        left = sum(60**k * int(part) for k, part in enumerate(reversed(clock.split(":"))))
        assert line.startswith(f"iter {i:>3}/{total}  eta ")
        if sum(done[:i]) >= 60 and i < total:
            assert left == pytest.approx(sum(done[i:]), rel=0.2, abs=1)


def test_a_quiet_run_logs_everything_to_its_file_and_prints_warnings_alone(tmp_path, capsys):
    for quiet, out in ((True, ""), (False, "hello\n")):
        with logging_to(tmp_path / str(quiet), rank=0, quiet=quiet):
            log.info("hello")
            log.warning("mind this")
        assert capsys.readouterr() == (out, "mind this\n")
        text = (tmp_path / str(quiet) / "log.txt").read_text()
        assert "hello" in text
        assert "mind this" in text


def test_the_console_hears_of_an_evaluation_whose_library_prints_into_the_log(tmp_path, capsys):
    with logging_to(tmp_path, rank=0):
        with printing_to_log():
            print("a table of the library's")
            log.info("evaluating 20/60")
        log.info("done")
    assert capsys.readouterr() == ("evaluating 20/60\ndone\n", "")
    text = (tmp_path / "log.txt").read_text()
    assert "a table of the library's" in text
    assert text.count("evaluating 20/60") == 1

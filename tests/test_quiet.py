"""What is printed: with --quiet nothing, in a file plain lines, in a terminal a bar below them."""

import contextlib
import fcntl
import importlib
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from moco_common.progress import follow
from pretrain.doctor.machine import WARNING, Finding
from tests.conftest import QUICK
from tests.pretrain.runs import write_photographs
from tests.test_docs_walk import TINY

ROOT = Path(__file__).parents[1]


def road(folder):
    """Each tool's shortest use, in the order of the road."""
    photos = write_photographs(folder / "photos", 32)  # twice the queue
    moco, boxes = folder / "moco", folder / "boxes"
    weights, last = folder / "moco.pkl", moco / "checkpoint_last.pth"
    data = f"voc:{folder / 'voc'}:"
    yield (
        "pretrain",
        ["--config", "small-data", "--data", photos, "--output-dir", moco, *TINY["pretrain"]],
    )
    yield "inspect_run", [moco, "--images", "4", "--queries", "1", "-k", "1", "--workers", "0"]
    yield "convert", [last, "-o", weights]
    yield "train_net", [
        *("--config", "VOC-small", "--train-data", f"{data}trainval", "--test-data", f"{data}test"),
        *("--output-dir", boxes, "MODEL.WEIGHTS", weights, *QUICK),
    ]  # fmt: skip
    yield "predict", ["--run", boxes, folder / "voc" / "JPEGImages", "-o", folder / "drawn"]
    yield "report", [boxes, "-o", folder / "report"]


@pytest.mark.timeout(600)
def test_a_quiet_tool_prints_nothing_at_all(tmp_path, voc_dir):
    """Neither its own lines nor third parties' warnings, which show in a process of its own."""
    (tmp_path / "voc").symlink_to(voc_dir)
    for tool, words in road(tmp_path):
        command = [sys.executable, ROOT / "tools" / f"{tool}.py", *words, "--quiet"]
        if tool in ("pretrain", "train_net"):  # KEY VALUE pairs end the line
            command = [*command[:2], "--quiet", *command[2:-1]]
        ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", ""), tool
    assert (tmp_path / "report" / "report.html").is_file()
    assert (tmp_path / "drawn" / "predictions.json").is_file()


def test_a_loop_is_followed_by_plain_lines_in_a_file(capsys, monkeypatch):
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr("moco_common.progress.time.monotonic", lambda: next(clock))
    assert list(follow("abcd", 4, "looking")) == list("abcd")
    assert capsys.readouterr().err == "looking: 2/4  eta 0:00:14\nlooking: 4/4  eta 0:00:00\n"
    assert list(follow("abcd", 4, "looking", quiet=True)) == list("abcd")
    assert capsys.readouterr().err == ""


IMPORTS = "from pathlib import Path; from types import SimpleNamespace"
PRETRAINING = """
from pretrain.engine.progress import Progress
progress = Progress(Path("."), start=0, total=4, batch_size=8)
for step in range(1, 5):
    progress.advance()
    progress.log(step, "hello", loss=1.0)
progress.close()
"""
FINE_TUNING = """
from moco_det.engine.console_log import TerminalBar, log, logging_to
with logging_to(Path("."), rank=0):
    bar = TerminalBar()
    bar.trainer = SimpleNamespace(iter=0, max_iter=4)
    bar.before_train()
    for step in range(1, 5):
        bar.after_step()
        log.info(f"iter {step}/4  hello")
    bar.after_train()
"""
LOOP = """
from moco_common.progress import follow
from tqdm import tqdm
sys.stderr = sys.stdout
for step in follow(range(1, 5), 4, "predicting"):
    tqdm.write(f"iter {step}/4  hello", file=sys.stderr)
"""
MEASURING = """
from moco_common import progress
clock = iter(range(0, 100, 7))
progress.time.monotonic = lambda: next(clock)
with progress.Loop("features", 4) as loop:
    for done in range(1, 5):
        if loop.at(done):
            loop.tell(f"{done}/4")
"""


def everything(reader):
    """All that was written before the other end was closed; it may come in parts."""
    parts = b""
    with contextlib.suppress(OSError):  # how a terminal says that it has ended
        while part := os.read(reader, 100_000):
            parts += part
    return parts


def shown_by(code, columns, folder):
    """What a program writes into a terminal of so many columns; of 0, into a pipe."""
    reader, writer = pty.openpty() if columns else os.pipe()
    if columns:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{IMPORTS}{code}"
    subprocess.run([sys.executable, "-c", code], stdout=writer, cwd=folder, check=True)
    os.close(writer)
    shown = everything(reader).decode().replace("\r\n", "\n")
    os.close(reader)
    bars = [part for part in re.split("[\r\n]", shown) if "%|" in part]
    assert bool(bars) == bool(columns)
    assert all(20 < len(bar) <= columns for bar in bars)  # one too long for its line stays there
    return shown, [line for line in (s.split("\r")[-1] for s in shown.split("\n")) if line.strip()]


@pytest.mark.parametrize("columns", [30, 100, 0])
@pytest.mark.parametrize("code", [PRETRAINING, FINE_TUNING, LOOP])
def test_a_bar_stays_below_the_lines_in_a_terminal_and_nowhere_else(tmp_path, code, columns):
    _, lines = shown_by(code, columns, tmp_path)
    assert [line[:10] for line in lines] == [f"iter {i}/4  h"[:10] for i in range(1, 5)]


@pytest.mark.parametrize("columns", [30, 100, 0])
def test_a_long_loop_is_a_bar_in_a_terminal_and_lines_elsewhere(tmp_path, columns):
    shown, lines = shown_by(MEASURING, columns, tmp_path)
    told = [
        f"features: {i}/4  eta {left}"
        for i, left in ((1, "0:00:21"), (2, "0:00:14"), (3, "0:00:07"))
    ]
    assert lines == ([] if columns else [*told, "features: 4/4  eta 0:00:00"])
    assert (", 2/4" in shown) == (columns == 100)


WORK = {  # what each tool calls once its arguments are checked, and arguments that pass
    "convert": ("moco_det.conversion.convert", ["x.pth"]),
    "data": ("moco_det.survey.survey.survey", ["voc:x"]),
    "demo": ("moco_det.demo.walk.Demo.run", []),
    "doctor": ("pretrain.doctor.report.examine", []),
    "inspect_run": ("pretrain.inspection.inspect_run.inspect_run", ["run"]),
    "predict": (
        "moco_det.inference.predictor.find_images",
        ["x.jpg", "--run", "run", "-o", "out"],
    ),
    "pretrain": ("pretrain.engine.train_loop.start", ["--config", "moco-v2", "--data", "x"]),
    "probe": ("pretrain.probe.run.probe", ["x.pth", "--train", "x"]),
    "report": ("moco_det.report.runs.read_runs", ["run", "-o", "out"]),
    "train_net": ("moco_det.engine.train_net.train_net", ["--config", "VOC"]),
}
CONTINUE = ("--resume", "again", "goes on", "holds")


@pytest.mark.parametrize("tool", WORK)
def test_ctrl_c_ends_a_tool_with_one_line_that_says_how_to_go_on(
    tool, monkeypatch, tmp_path, capsys
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    work, words = WORK[tool]
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"tools.{tool}")
    monkeypatch.setattr(module, "check_exists", lambda *_: None, raising=False)
    monkeypatch.setattr(work, interrupted)
    assert module.main(words) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stopped")
    assert err.count("\n") == 1
    assert tool == "doctor" or any(way in err for way in CONTINUE)
    assert list(tmp_path.iterdir()) == []


def test_a_quiet_doctor_names_only_what_is_not_ok(monkeypatch, capsys):
    found = [Finding("Python", "ok", "3.11"), Finding("memory", WARNING, "1 GB", "buy some")]
    monkeypatch.setattr("pretrain.doctor.report.examine", lambda folder: found)
    assert importlib.import_module("tools.doctor").main(["--quiet"]) == 0
    said = capsys.readouterr().out
    assert "Python" not in said
    assert "buy some" in said


@pytest.mark.parametrize("tool", WORK)
@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("module", ["tempfile", "torch"])
def test_an_interrupt_among_the_imports_ends_in_one_line(tmp_path, module, as_file, tool):
    """Among the imports of a tool itself, and among those of its work."""
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    for name in ("run", "x", "x.jpg", "x.pth"):
        (tmp_path / name).touch()
    file = ROOT / "tools" / f"{tool}.py"
    ran = subprocess.run(
        [sys.executable, *([file] if as_file else ["-m", f"tools.{tool}"]), *WORK[tool][1]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert ran.returncode in (-2, 130), ran.stderr
    assert ran.stderr.startswith("stopped")
    assert ran.stderr.count("\n") == 1

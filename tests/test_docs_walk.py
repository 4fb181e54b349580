"""The README and the tutorial are executed: every command, in order.

They run in a folder that contains what the pages assume, ``photos/`` and ``boxes/``. The command
lines are passed as they stand; only overrides that make everything tiny are appended. An indented
block without a command is the output of the command before it: the beginning of each of its lines
must still be printed.
"""

import importlib
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import QUICK
from tests.pretrain.runs import write_photographs

ROOT = Path(__file__).parents[1]
TOOL = re.compile(r"^(?:\.venv/bin/python )?(?:tools/(\w+)\.py|moco-([a-z-]+))(?: |$)")
# Set-up commands, which are not executed: the environment is the one that the tests run in.
SET_UP = re.compile(r"^(make (?P<target>\S+)|\. \.venv/bin/activate|git clone|cd )")
TINY = {
    "pretrain": "--num-gpus 1 MODEL.WIDTH 0.0625 MODEL.BN_GROUPS 2 INPUT.CROP_SIZE 32 MOCO.DIM 8 "
    "MOCO.QUEUE_SIZE 16 SOLVER.BATCH_SIZE 8 SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 1 LOG.PERIOD 1 "
    "DATALOADER.NUM_WORKERS 0".split(),
    "train_net": ["--num-gpus", "1", *QUICK],
}


@dataclass
class Step:
    """A command of a page, and its output according to the page."""

    command: str
    prints: list[str] = field(default_factory=list)


def steps(text):
    """The commands of a page, in order, without fenced blocks, which are illustrations."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).replace("\\\n", " ")
    found = []
    for block in re.findall(r"(?:^    .*\n?)+", text, flags=re.M):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        code = [line for line in lines if not line.startswith("# ")]
        if code and (TOOL.match(code[0]) or SET_UP.match(code[0])):
            found += [Step(line) for line in code]
        elif found:
            found[-1].prints += lines
    return found


def run(step, capfd):
    """Run a step of a page in the current folder, made tiny, and return what it printed."""
    tool, words = TOOL.match(step.command), shlex.split(step.command, comments=True)
    assert tool, f"unknown command: {step.command}"
    name = tool.group(1) or tool.group(2).replace("-", "_")
    name = "inspect_run" if name == "inspect" else name  # a file inspect.py would hide Python's own
    at = next(i for i, word in enumerate(words) if TOOL.match(f"{word} "))
    words = [*words[at + 1 :], *TINY.get(name, ())]
    if "--trials" in words:
        words += ["--trials", "1"]
    try:
        status = importlib.import_module(f"tools.{name}").main(words) or 0
    except SystemExit as end:  # argparse's
        status = end.code
    printed = "".join(capfd.readouterr())
    assert status == 0, f"{step.command}\nends with {status}:\n{printed}"
    return printed


def beginning(line):
    """The beginning of a line of output, up to the first number, which does not vary."""
    words = re.split(r"[0-9~±/|]|\.\.\.| - ", line.strip())[0].split()
    return " ".join(words[:2])


def walk(text, capfd):
    for step in steps(text):
        set_up = SET_UP.match(step.command)
        if set_up:
            target = set_up.group("target")
            assert not target or re.search(
                rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M
            ), step.command
            continue
        printed = run(step, capfd)
        there = {" ".join(line.split())[: len(begin)] for line in printed.splitlines()
                 for begin in map(beginning, step.prints)}  # fmt: skip
        for line in step.prints:
            assert beginning(line) in there, f"{step.command}\ndoes not print: {line}\n{printed}"


@pytest.fixture
def folder(tmp_path, voc_dir, monkeypatch):
    write_photographs(tmp_path / "photos")
    (tmp_path / "boxes").symlink_to(voc_dir)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("broken", [
    "    moco-doctor --quikc\n",
    "    moco-convert runs/moco/checkpoint_last.pth -o moco.pkl\n",  # nothing trained it
    "    moco-convert --help\n\nsays\n\n    everything is perfect\n",
    "    make fun\n",
    "    moco-convert --help\n    rm -r photos\n",
])  # fmt: skip
def test_a_broken_page_is_noticed(folder, capfd, broken):
    with pytest.raises(AssertionError):
        walk(broken, capfd)


@pytest.mark.timeout(600)
def test_the_commands_of_the_readme_work_in_order(folder, capfd):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    road = text[text.index("## From your own photographs to a detector") :]
    road = road[: road.index("\n## ", 4)]
    assert len(steps(road)) >= 6
    walk(road, capfd)
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    assert list((folder / "drawn").glob("*"))


@pytest.mark.timeout(600)
def test_the_commands_of_the_tutorial_work_in_order(folder, capfd):
    walk((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), capfd)
    assert (folder / "views.png").stat().st_size > 10_000
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    assert list((folder / "drawn").glob("*"))

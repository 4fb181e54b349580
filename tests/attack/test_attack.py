"""The attack itself: its arena sees each kind of harm, and a sample of its files does none.

The whole of it takes long: `make soak`, or ``python -m tests.attack``.
"""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.attack import arena, pickles
from tests.attack.arena import Arena, Try

ROOT = Path(__file__).parents[2]


def _refuses(argv):
    print("error: no.", file=sys.stderr)
    return 1


def _refuses_without_a_sentence(argv):
    return 1


def _touches_the_proof(argv):
    Path(arena.PROOF).touch()


def _runs_a_command(argv):
    subprocess.run(["true"])


def _connects(argv):
    import socket

    with socket.socket() as connection:
        connection.connect_ex(("127.0.0.1", 9))


def _sleeps(argv):
    time.sleep(100)


def _fills_memory(argv):
    bytearray(2 * arena.MEMORY)


def _writes_elsewhere(argv):
    Path(argv[0]).write_text("x")


def _unpickles(argv):
    with open("x.pth", "rb") as file:
        pickle.load(file)


@pytest.mark.parametrize(
    ("function", "verdict"),
    [
        (lambda argv: None, arena.ACCEPTED),
        (_refuses, arena.REFUSED),
        (_refuses_without_a_sentence, arena.UNCLEAR),
        (_touches_the_proof, arena.EXECUTED),
        (_runs_a_command, arena.EXECUTED),
        (_connects, arena.EXECUTED),
        (lambda argv: os.kill(os.getpid(), 9), arena.TRACEBACK),
        (lambda argv: {}["missing"], arena.TRACEBACK),
        (_sleeps, arena.HUNG),
        (_fills_memory, arena.EXHAUSTED),
        (_writes_elsewhere, arena.WROTE),
    ],
)
def test_the_arena_sees_each_kind_of_harm(tmp_path, function, verdict):
    outcome = Arena(wall_seconds=3 if function is _sleeps else 200).run(
        Try("", function, [str(tmp_path / "elsewhere")], tmp_path / "sandbox")
    )
    assert outcome.verdict == verdict, outcome.text


def test_the_payloads_are_real(tmp_path):
    """A reader that unpickles freely is executed by most of the calls that name the proof."""
    seen, room = set(), Arena()
    for number, (module, name, arguments) in enumerate(pickles.CALLS[:36]):
        if "{proof}" not in str(arguments):
            continue
        content = pickles.instructions(
            module, name, pickles._filled(arguments, arena.PROOF), "reduce2"
        )
        outcome = room.run(
            Try(
                name,
                _unpickles,
                [],
                tmp_path / str(number),
                lambda sandbox, content=content: (sandbox / "x.pth").write_bytes(content),
            )
        )
        if outcome.verdict == arena.EXECUTED:
            seen.add(f"{module}.{name}")
    assert {"os.system", "subprocess.Popen", "builtins.eval", "builtins.exec"} <= seen
    assert len(seen) > 15


def test_a_sample_of_the_attack_does_no_harm():
    words = ["--share", "0.002", "--processes", "1"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.attack", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "0 executed, 0 hung, 0 traceback" in done.stdout.splitlines()[-1]

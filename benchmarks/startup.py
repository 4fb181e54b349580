"""Start-up time of every tool: `--help` and a usage error, beside `python -c pass`.

    python benchmarks/startup.py [--rounds 5]

Each command line runs in a process of its own and takes turns with the others, so that a noisy
machine is noisy for all. Printed is the median over the rounds in seconds, and the ratio to the
bare interpreter. A tool is to answer within LIMIT seconds on two idle cores; the exit status is 1
if one does not.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.turns import take_turns

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.5  # seconds
MISTAKES = {  # of each tool, the one that gets furthest before it is reported
    "convert": ["absent.pth"],
    "data": ["voc:DIR", "--split", "80%"],
    "demo": ["--no-such-flag"],
    "doctor": ["--no-such-flag"],
    "inspect_run": ["absent"],
    "predict": [".", "--config", "absent", "--weights", ".", "-o", "out"],
    "pretrain": ["--config", "moco-v2", "--data", ".", "SOLVER.ABSENT", "1"],
    "probe": ["absent.pth", "--train", "."],
    "report": ["absent", "-o", "out"],
    "train_net": ["--config", "VOC", "SOLVER.ABSENT", "1"],
}


def command(words: list[str], status: int) -> Callable[[], None]:
    """A call that runs Python with these arguments and checks its exit status."""

    def run() -> None:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    rounds = parser.parse_args().rounds
    calls = {"python": command(["-c", "pass"], 0)}
    for tool, words in MISTAKES.items():
        file = f"tools/{tool}.py"
        calls[tool] = command([file, "--help"], 0)
        calls[f"{tool}_error"] = command([file, *words], 2 if words == ["--no-such-flag"] else 1)
    medians = {
        name: statistics.median(times) / 1e3 for name, times in take_turns(calls, rounds).items()
    }
    print(f"median of {rounds} rounds; python -c pass: {medians['python']:.3f} s")
    for name, seconds in medians.items():
        if name != "python":
            ratio = seconds / medians["python"]
            print(f"ratio startup_{name} {ratio:.1f}   # {seconds:.3f} s, limit {LIMIT} s")
    return 1 if max(medians.values()) > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())

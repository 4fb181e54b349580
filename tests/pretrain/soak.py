"""Kills real runs at random moments, resumes them, and compares their ends, bit for bit.

    python -m tests.pretrain.soak --kills 100 --processes 1 2

A run is killed (kill -9) again and again, at its start, between and in its steps, and while it
writes a checkpoint: all of it, or the main process and not its data-loader worker, or one rank of
several. Whatever is left of it is resumed. When it reaches its end, its last checkpoint and its
record of losses must be those of a run that nobody killed. Then comes the next run, until there
were enough kills.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from moco_common.text import duration
from pretrain.checkpoint import format as checkpoint
from tests.pretrain.runs import TINY, Run, assert_equal_checkpoints, run, write_photographs

STEPS = 60
OPTIONS = [*TINY, "SOLVER.MAX_ITER", STEPS, "SOLVER.EPOCHS", "100", "CHECKPOINT.KEEP", "2"]


class Soak:
    """Runs on ``ranks`` ranks in ``room``, which are killed at moments that ``dice`` choose."""

    def __init__(self, room: Path, ranks: int, dice: random.Random, workers: int = 1) -> None:
        self.room, self.ranks, self.dice = room, ranks, dice
        photographs = write_photographs(room / "photographs")
        self.words = ["--data", photographs, *OPTIONS, "DATALOADER.NUM_WORKERS", workers]
        self.whole = room / f"whole-{ranks}"
        code, text = run("--output-dir", self.whole, *self.words, ranks=ranks)
        if code:
            raise SystemExit(f"the run that nobody kills failed:\n{text}")
        self.moments: Counter[str] = Counter()

    def one_run(self, most_kills: int) -> int:
        """A run from start to end; returns how often it was killed. It must end like the whole."""
        folder, kills = self.room / "run", 0
        shutil.rmtree(folder, ignore_errors=True)
        words = ["--resume", "--output-dir", folder, *self.words]
        while kills < most_kills and self._killed(Run(*words, ranks=self.ranks), folder):
            kills += 1
        code, text = run(*words, ranks=self.ranks)
        if code:
            raise SystemExit(f"a resumed run failed:\n{text}")
        assert_equal_checkpoints(folder / checkpoint.LAST, self.whole / checkpoint.LAST)
        assert losses(folder) == losses(self.whole), "the records differ"
        left = [path.name for path in folder.glob(".*")]
        assert not left, f"left behind: {left}"
        return kills

    def _killed(self, victim: Run, folder: Path) -> bool:
        """Kill it at a random moment; False if it ended before."""
        moment = self.dice.choice(["start", "step", "save", "save"])
        if moment == "start":
            time.sleep(self.dice.uniform(0, 1))
        else:
            target = len(losses(folder)) + self.dice.randrange(1, 16)
            self._wait(victim, lambda: len(losses(folder)) >= target)
            if moment == "save":
                self._wait(victim, lambda: any(folder.glob(".checkpoint*.part")))
                time.sleep(self.dice.uniform(0, 0.004))
            else:
                time.sleep(self.dice.uniform(0, 0.04))
        if any(rank.exitcode is not None for rank in victim.ranks):
            codes = victim.wait()
            if any(codes):
                raise SystemExit(f"a run failed by itself ({codes}):\n{victim.text}")
            return False
        if moment != "start" and self.dice.random() < 0.5:
            victim.signal(signal.SIGKILL, rank=self.dice.randrange(self.ranks))
            moment += ", one process"
            end = time.monotonic() + 20  # the others miss it and end by themselves
            while time.monotonic() < end and any(r.exitcode is None for r in victim.ranks):
                time.sleep(0.02)
        victim.kill()
        self.moments[moment] += 1
        return True

    @staticmethod
    def _wait(victim: Run, condition) -> None:
        while not condition() and all(rank.exitcode is None for rank in victim.ranks):
            time.sleep(0.0005)


def losses(folder: Path) -> list[tuple[int, float]]:
    """Iteration and loss of every line of the record; a half line does not count."""
    path = folder / "metrics.json"
    result = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        result.append((record["iteration"], record["loss"]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pretrain.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, default=1, help="data-loader processes a rank")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    total, done, began = args.kills * len(args.processes), 0, time.monotonic()
    for ranks in args.processes:
        with tempfile.TemporaryDirectory() as room:
            soak = Soak(Path(room), ranks, random.Random(args.seed), args.workers)
            here = runs = 0
            while here < args.kills:
                kills = soak.one_run(args.kills - here)
                here, done, runs = here + kills, done + kills, runs + 1
                eta = duration((time.monotonic() - began) / max(1, done) * (total - done))
                print(
                    f"{ranks} processes: {here}/{args.kills} kills, {runs} runs ended bit for bit "
                    f"as the whole one  eta {eta}",
                    flush=True,
                )
            print(", ".join(f"{n} at {moment}" for moment, n in soak.moments.most_common()))
    print(
        f"soak: {done} of {total} kills survived, {' and '.join(map(str, args.processes))} "
        f"processes, {duration(time.monotonic() - began)}"
    )


if __name__ == "__main__":
    sys.exit(main())

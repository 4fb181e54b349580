"""Try every hostile file on every tool that would read it, and count how each try ended.

    python -m tests.attack [--only KIND ...] [--share 0.1] [--processes 2] [--seed 0]

The files are made by the generators of this folder; none is stored. See `arena` for what a try is
and `plan` for which tool reads what. Exit status 1 if anything ran, hung, ended in a traceback,
filled the memory, wrote outside its folder, or was refused without a sentence.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

COLUMNS = ("tried", "refused", "accepted harmlessly", "executed", "hung", "traceback")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="KIND", help="parts of kinds' names"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the tries (default: all)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="tries at a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the share")
    parser.add_argument("--keep", type=Path, help="folder for the sandboxes of failed tries")
    args = parser.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        return attack(Path(name), args)


def import_everything() -> None:
    """Import what the tools import, so that a fork does not."""
    import warnings

    warnings.simplefilter("ignore")
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401
    import torchvision  # noqa: F401
    import webdataset  # noqa: F401

    import pretrain.engine.train_loop
    import pretrain.inspection.inspect_run
    import pretrain.probe.run  # noqa: F401

    torch.set_num_threads(1)


def attack(root: Path, args: argparse.Namespace) -> int:
    from tests.attack.arena import FAULTS, FINE, Arena, Outcome
    from tests.attack.ground import build_ground
    from tests.attack.plan import plan, tries

    ground = build_ground(root / "ground")
    (root / "tries").mkdir()
    totals: Counter[str] = Counter()
    for kind in plan(ground):
        if args.only and not any(word in kind for word in args.only):
            continue
        dice, began = random.Random(args.seed), time.monotonic()
        counts: Counter[str] = Counter()

        def note(outcomes: list[Outcome], counts: Counter[str] = counts) -> None:
            for outcome in outcomes:
                counts["tried"] += 1
                counts[outcome.verdict] += 1
                if outcome.verdict not in FINE:
                    print(f"\n{outcome.verdict.upper()}  {outcome.name} ({outcome.seconds:.1f} s)")
                    print(
                        "    " + "\n    ".join(outcome.text.strip().splitlines()[-14:]), flush=True
                    )
                elif outcome.seconds > 20:
                    print(f"slow ({outcome.seconds:.0f} s): {outcome.name}", flush=True)

        arena = Arena(args.processes)
        for attempt in tries(kind, ground, root / "tries"):
            if dice.random() < args.share:
                note(arena.start(attempt))
                _sweep(root / "tries", arena)
        note(arena.finish())
        _sweep(root / "tries", arena)
        totals += counts
        print(f"{_line(kind, counts)}  {time.monotonic() - began:.0f} s", flush=True)
    print(_line("all", totals))
    return 1 if any(totals[fault] for fault in FAULTS) else 0


def _sweep(folder: Path, arena: object) -> None:
    """Remove the sandboxes of tries that have ended."""
    running = {attempt.sandbox.name for attempt, _ in arena._running.values()}  # type: ignore[attr-defined]
    for path in folder.iterdir():
        if path.name.split(".")[0] not in running:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _line(kind: str, counts: Counter[str]) -> str:
    others = [f"{n} {verdict}" for verdict, n in sorted(counts.items()) if verdict not in COLUMNS]
    shown = [f"{counts[column]} {column}" for column in COLUMNS]
    return f"{kind + ':':<28} {', '.join(shown + others)}"


if __name__ == "__main__":
    sys.exit(main())

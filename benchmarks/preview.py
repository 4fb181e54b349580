"""Rank correlation between previews (short fine-tunings) and the full schedule.

    python benchmarks/preview.py                                   # MoCo on the demo's images
    python benchmarks/preview.py --weights a.pkl b.pkl random --data voc:DIR:train voc:DIR:test

Without --weights, one pre-training is run on the demo's generated images, and its checkpoints after
--steps iterations (0: random weights) are the backbones. Each backbone is fine-tuned with the full
schedule and with each preview, with the same seeds. Agreement is measured by Kendall's tau-b and
Spearman's rho of the mean AP of n backbones, and by the share of all orders that agree at least as
well. The fine-tunings run in parallel, each in a single-threaded process; finished ones are not
repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from scipy import stats

from benchmarks.evidence.jobs import ROOT, Job, run_jobs
from moco_common.errors import UserError, run_tool
from moco_common.files import replace_text
from moco_det.demo.scene_dataset import write_scenes

FULL = "full"
# Shares of the labels and of the full schedule's length. COCO-FPN-12k reduces the length only;
# VOC-10pct and VOC-1pct reduce both.
PREVIEWS = {"short": (1.0, 0.1), "10pct": (0.1, 0.1), "1pct": (0.01, 0.1)}
METRICS = ("AP", "AP50")
MOST_EXACT = 8  # largest number of backbones for which all orders are counted


def chance(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the share of all orders of ``b`` that agree with ``a`` at least as well, in (0, 1].

    Above `MOST_EXACT` items, the share is estimated from random orders.
    """
    signs = np.sign(np.subtract.outer(a, a))

    def concordance(order: np.ndarray) -> float:  # tau is proportional to it
        return float((signs * np.sign(np.subtract.outer(order, order))).sum())

    found = stats.permutation_test(
        (np.asarray(b),),
        concordance,
        permutation_type="pairings",
        alternative="greater",
        n_resamples=math.factorial(MOST_EXACT),
        vectorized=False,
        random_state=0,
    )
    return float(found.pvalue)


def agreement(
    scores: dict[str, dict[str, list[float]]], preview: str
) -> dict[str, float | int | None]:
    """Compute tau, rho, p and n over the backbones that have both fine-tunings.

    Args:
        scores: backbone -> variant -> scores of the seeds.
    """
    both = [s for s in scores.values() if s.get(FULL) and s.get(preview)]
    if len(both) < 2:
        return {"n": len(both), "tau": None, "rho": None, "p": None}
    quick, slow = ([float(np.mean(s[kind])) for s in both] for kind in (preview, FULL))
    return {
        "n": len(both),
        "tau": float(stats.kendalltau(quick, slow).statistic),
        "rho": float(stats.spearmanr(quick, slow).statistic),
        "p": chance(quick, slow),
    }


def backbones(args: argparse.Namespace) -> tuple[dict[str, Path | None], tuple[str, str], Path]:
    """Return the backbones, the training and test data, and a file with the network.

    The backbones map names to converted files (None for random weights, which take the network of
    that file). Without ``--weights``, they are pre-trained here.
    """
    if args.weights:
        if not args.data:
            raise UserError(
                "--weights needs data: pass --data TRAIN TEST, such as voc:DIR:train voc:DIR:test."
            )
        files = [Path(name) for name in args.weights if name != "random"]
        if not files:
            raise UserError(
                "--weights lists random weights only: add a converted file, whose network they use."
            )
        named: dict[str, Path | None] = {file.stem: file.resolve() for file in files}
        if len(named) < len(files):
            raise UserError(
                "two files of --weights have the same name, which identifies their results: rename "
                "one of them."
            )
        if "random" in args.weights:
            named["random"] = None
        return named, tuple(args.data), files[0].resolve()
    scenes, run = args.output / "scenes", args.output / "pretraining"
    counts = dict(zip(("unlabelled", "train", "test"), args.images, strict=True))
    for _ in write_scenes(scenes, seed=args.seed, **counts):
        pass
    steps = sorted(set(args.steps) - {0})
    if not steps:
        raise UserError("--steps has no number above 0: add one.")
    period = math.gcd(*steps)
    run.mkdir(parents=True, exist_ok=True)
    train = [sys.executable, str(ROOT / "tools" / "pretrain.py"), "--config", "scenes", "--resume"]
    train += ["--data", str(scenes / "unlabelled"), "--output-dir", str(run)]
    train += ["SEED", str(args.seed), "SOLVER.MAX_ITER", str(steps[-1])]
    train += ["CHECKPOINT.PERIOD", str(period), "CHECKPOINT.KEEP", str(steps[-1] // period)]
    train += args.pretraining
    last = run / f"checkpoint_{steps[-1]:08d}.pth"
    made = {f"moco-{step}": args.output / f"moco-{step}.pkl" for step in steps}
    convert = [
        Job(f"convert {name}", args.output, [_convert(run, step, file)], file)
        for step, (name, file) in zip(steps, made.items(), strict=True)
    ]
    for jobs, what in (([Job("pre-training", run, [train], last)], "pre-training"), (convert, "")):
        failures = run_jobs(jobs, args.parallel, what or "conversions")
        if failures:
            raise UserError(failures[0])
    found: dict[str, Path | None] = {**made, **({"random": None} if 0 in args.steps else {})}
    data = (f"voc:{scenes / 'voc'}:train", f"voc:{scenes / 'voc'}:test")
    return found, data, made[f"moco-{steps[-1]}"]


def _convert(run: Path, step: int, file: Path) -> list[str]:
    tool = [sys.executable, str(ROOT / "tools" / "convert.py")]
    return [*tool, str(run / f"checkpoint_{step:08d}.pth"), "-o", str(file)]


def fine_tunings(
    args: argparse.Namespace,
    named: dict[str, Path | None],
    data: tuple[str, str],
    like: Path,
) -> dict[tuple[str, str, int], Job]:
    """Return the fine-tuning job of each (backbone, variant, seed), quick previews first."""
    jobs = {}
    variants = {**{k: PREVIEWS[k] for k in args.previews}, FULL: (1.0, 1.0)}
    for seed, (variant, (share, part)), (name, file) in itertools.product(
        range(args.seeds), variants.items(), named.items()
    ):
        folder = args.output / f"{name}-{variant}-{args.iterations}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume"]
        command += ["--config", args.config if file else f"{args.config}-random"]
        command += ["--train-data", data[0], "--test-data", data[1], "--output-dir", str(folder)]
        command += ["MODEL.WEIGHTS" if file else "MODEL.ARCHITECTURE_FROM", str(file or like)]
        command += ["SEED", str(seed), "DATASETS.LABEL_SHARE", str(share)]
        command += ["SOLVER.MAX_ITER", str(max(1, round(part * args.iterations)))]
        command += args.fine_tuning
        job = Job(f"{name} {variant} seed {seed}", folder, [command], folder / "results.json")
        jobs[name, variant, seed] = job
    return jobs


def collect(jobs: dict[tuple[str, str, int], Job], metric: str) -> dict[str, Any]:
    """Return backbone -> variant -> scores of the finished seeds, in percent."""
    scores: dict[str, Any] = {}
    for (name, variant, _), job in jobs.items():
        if job.done.is_file():
            value = json.loads(job.done.read_text())["bbox"][metric]
            scores.setdefault(name, {}).setdefault(variant, []).append(value or 0.0)
    return scores


def document(scores: dict[str, dict[str, Any]], previews: Sequence[str]) -> str:
    """Format the agreement, and the scores of every backbone, as Markdown."""
    lines = ["| metric | preview | n | Kendall's tau | Spearman's rho | orders as good |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for metric, preview in itertools.product(scores, previews):
        found = agreement(scores[metric], preview)
        values = ["-" if found[k] is None else f"{found[k]:.2f}" for k in ("tau", "rho")]
        p = "-" if found["p"] is None else f"{100 * float(found['p'] or 0):.1f} %"
        lines.append(f"| {metric} | {preview} | {found['n']} | {' | '.join(values)} | {p} |")
    variants = [*previews, FULL]
    heads = [f"{variant} {metric}" for metric in scores for variant in variants]
    lines += ["", f"| backbone | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in next(iter(scores.values()), {}):
        cells = []
        for metric, variant in itertools.product(scores, variants):
            values = scores[metric][name].get(variant, [])
            mean = f"{np.mean(values):.1f}" if values else "-"
            cells.append(mean + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add(
        "--weights",
        nargs="+",
        metavar="FILE",
        help="converted backbones; 'random' adds random weights",
    )
    add("--data", nargs=2, metavar="SPEC", help="training and test data for --weights")
    add("--images", nargs=3, type=int, default=[4000, 300, 200], metavar="N",
        help="numbers of unlabelled, training and test images (4000 300 200)")  # fmt: skip
    add("--steps", nargs="+", type=int, default=[0, 200, 400, 800, 1600], metavar="N",
        help="pre-training steps of the backbones (0 200 400 800 1600)")  # fmt: skip
    add("--previews", nargs="+", choices=PREVIEWS, default=list(PREVIEWS), metavar="NAME",
        help=f"previews to measure ({' '.join(PREVIEWS)})")  # fmt: skip
    add("--config", default="scenes", metavar="NAME", help="protocol of all fine-tunings (scenes)")
    add("--iterations", type=int, default=600, metavar="N", help="full schedule's length (600)")
    add("--seeds", type=int, default=2, metavar="N", help="number of fine-tuning seeds (2)")
    add("--seed", type=int, default=0, metavar="N", help="seed of images and pre-training (0)")
    add("--parallel", type=int, default=2, metavar="N", help="number of parallel jobs (2)")
    add("--pretraining", nargs="+", default=[], metavar="KEY VALUE", help="pre-training overrides")
    add("--fine-tuning", nargs="+", default=[], metavar="KEY VALUE", help="fine-tuning overrides")
    add("--output", type=Path, default=Path("runs/preview"), metavar="DIR",
        help="output folder (runs/preview)")  # fmt: skip
    return result


def measure(args: argparse.Namespace) -> int:
    """Run what is missing, then write and print the results of all finished runs."""
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    named, data, like = backbones(args)
    jobs = fine_tunings(args, named, data, like)
    failures = run_jobs(list(jobs.values()), args.parallel, "fine-tunings")
    scores = {metric: collect(jobs, metric) for metric in METRICS}
    text = document(scores, args.previews)
    replace_text(args.output / "preview.md", text)
    replace_text(args.output / "preview.json", json.dumps(scores, indent=1) + "\n")
    print(f"{text}\nwritten to {args.output / 'preview.md'} and .json")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement; return the exit status."""
    args = parser().parse_args(argv)
    return run_tool(lambda: measure(args), "stopped: run the same command again to continue")


if __name__ == "__main__":
    sys.exit(main())

"""The papers' comparisons at a size that two cores can run, as docs/evidence.md.

    python benchmarks/evidence/run.py --data DIR [--test DIR]       # folders of class folders
    python benchmarks/evidence/run.py --data DIR --only momentum --seeds 5
    python benchmarks/evidence/run.py --data DIR --document-only    # from the finished cells

Cells (one training with one seed) run in parallel, each in a single-threaded process with a folder
under --output. Finished cells are not repeated, so the same command continues after a stop.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.evidence.cell import RESULT, SPEC, config
from benchmarks.evidence.detection import SMALL, Detectors
from benchmarks.evidence.document import Measured, write_document
from benchmarks.evidence.figures import STEPS, figures
from benchmarks.evidence.jobs import ROOT, Job, run_jobs
from benchmarks.evidence.terms import Cell, Figure
from moco_common.errors import run_tool
from moco_common.files import replace_text
from moco_det.demo.scene_dataset import write_scenes
from pretrain.probe.datasets import LabelledImages, open_train_and_test, stratified_split


def write_pool(images: LabelledImages, size: int, output: Path) -> str:
    """Write a list of images to pre-train on; return its path.

    It has ``size`` of the training images (or all of them, if there are no more), stratified by
    class and the same for every seed. There are no test images among them.
    """
    rows = np.arange(len(images))
    if size < len(images):
        _, rows = stratified_split(images.labels, size / len(images), seed=0)
    path = output / f"pool-{len(rows)}.txt"
    output.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(f"{os.path.abspath(images.name(row))}\n" for row in rows.tolist()))
    return str(path)


def cell_folder(output: Path, cell: Cell, seed: int, how: dict[str, Any]) -> Path:
    """Return the folder of a cell, which depends on its settings but not on figure or label."""
    cfg = config(dict(cell.overrides), seed)
    key = json.dumps([cfg.dump(), cell.trained, cell.script, how], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    return output / "cells" / f"{cfg.METHOD if cell.trained else 'random'}-s{seed}-{digest}"


def cell_job(folder: Path, cell: Cell, seed: int, how: dict[str, Any], write: bool = True) -> Job:
    """Return the job of one cell; with ``write``, also write its specification."""
    spec = {"overrides": dict(cell.overrides), "seed": seed, "trained": cell.trained, **how}
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / SPEC, json.dumps(spec, indent=1) + "\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "evidence" / cell.script), str(folder)]
    return Job(f"{cell.label} seed {seed}", folder, [command], folder / RESULT)


def measurements(
    cells: Mapping[tuple[str, int], Path], detectors: Detectors | None
) -> dict[str, list[dict[str, float]]]:
    """Return the results of each label, one dictionary per finished seed."""
    found: dict[str, list[dict[str, float]]] = {}
    for (label, seed), folder in cells.items():
        if (folder / RESULT).exists():
            result = {"seed": seed, **json.loads((folder / RESULT).read_text())}
            result |= detectors.results(folder) if detectors else {}
            found.setdefault(label, []).append(result)
    return found


def detectors_of(figure: Figure, args: argparse.Namespace, scenes: Path) -> Detectors | None:
    """Return the fine-tuning settings of a figure's cells; None if they are not fine-tuned."""
    if figure.detection and figure.data == "scenes":
        splits = (f"voc:{scenes / 'voc'}:{split}" for split in ("train", "test"))
        return Detectors("scenes", *splits, iterations=150, seeds=args.detection_seeds)
    if figure.detection and args.detection:
        return Detectors(
            "VOC",
            *args.detection,
            iterations=args.detection_iterations,
            share=args.detection_share,
            settings=SMALL,
            seeds=args.detection_seeds,
        )
    return None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    names = [figure.name for figure in figures()]
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--data", metavar="DIR", required=True, help="class folders to pre-train and probe on")
    add("--test", metavar="DIR", help="class folders to test on (default: a held-out fifth)")
    add("--detection", nargs=2, metavar="SPEC", help="training and test data of the detectors")
    add("--only", nargs="+", choices=names, default=names, metavar="FIGURE",
        help=f"figures to run: {', '.join(names)} (default: all)")  # fmt: skip
    add("--seeds", type=int, default=3, metavar="N", help="number of seeds (3)")
    add("--budget", type=int, default=STEPS, metavar="STEPS", help=f"steps per cell ({STEPS})")
    add("--detection-seeds", type=int, default=3, metavar="N", help="number of detector seeds (3)")
    add("--detection-iterations", type=int, default=300, metavar="N",
        help="iterations per detector (300)")  # fmt: skip
    add("--detection-share", type=float, default=1.0, metavar="S", help="share of the labels (1)")
    add("--pool", type=int, default=4000, metavar="N", help="images to pre-train on (4000)")
    add("--probe-size", type=int, default=64, metavar="PX", help="image side for the probe (64)")
    add("--parallel", type=int, default=2, metavar="N", help="number of parallel cells (2)")
    add("--output", type=Path, default=Path("runs/evidence"), metavar="DIR",
        help="folder of the cells (runs/evidence)")  # fmt: skip
    add("--document", type=Path, default=ROOT / "docs" / "evidence.md", metavar="FILE",
        help="page to write (docs/evidence.md)")  # fmt: skip
    add("--document-only", action="store_true", help="write the page without running any cell")
    add("--plan", action="store_true", help="list the cells to run, and stop")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the unfinished cells, then write the page from all finished ones."""
    args = parser().parse_args(argv)
    return run_tool(lambda: evidence(args), "stopped: run the same command again to continue")


def evidence(args: argparse.Namespace) -> int:
    """Run the evidence for parsed arguments; return the exit status."""
    train, test = open_train_and_test(args.data, args.test)
    output = args.output.resolve()
    scenes = output / "scenes"
    given = {
        "pool": write_pool(train, args.pool, output),
        "train": str(Path(args.data).resolve()),
        "test": str(Path(args.test).resolve()) if args.test else None,
        "holdout": 0.2,
        "probe_size": args.probe_size,
    }
    how = {"given": given, "scenes": {"pool": str(scenes / "unlabelled"), "train": None}}
    everything = figures(args.budget)
    folders = {
        figure.name: {
            (cell.label, seed): cell_folder(output, cell, seed, how[figure.data])
            for seed in range(args.seeds)
            for cell in figure.cells
        }
        for figure in everything
    }
    detectors = {figure.name: detectors_of(figure, args, scenes) for figure in everything}
    wanted = [figure for figure in everything if figure.name in args.only]
    only_look = args.plan or args.document_only
    jobs: dict[Path, Job] = {}
    for seed in range(args.seeds):  # the first seed of all cells comes before the second of any
        for figure in wanted:
            for cell in figure.cells:
                folder = folders[figure.name][cell.label, seed]
                if folder not in jobs:
                    what = how[figure.data]
                    jobs[folder] = cell_job(folder, cell, seed, what, write=not only_look)
    if args.plan:
        print(
            "\n".join(f"{'done' if j.done.exists() else 'todo'}  {j.folder}" for j in jobs.values())
        )
        return 0
    failures = []
    if not args.document_only:
        if any(figure.data == "scenes" for figure in wanted):
            for _ in write_scenes(scenes):
                pass
        failures = run_jobs(list(jobs.values()), args.parallel, "cells")
        for figure in wanted:
            if fine_tuned := detectors[figure.name]:
                of = fine_tuned.jobs(figure, folders[figure.name])
                failures += run_jobs(of, args.parallel, f"detectors of {figure.name}")
    measured = [
        Measured(figure, measurements(folders[figure.name], detectors[figure.name]))
        for figure in everything
    ]
    facts = {
        "images for pre-training": Path(given["pool"]).stem.partition("-")[2],
        "images for the probe": f"{len(train):,} for training, {len(test):,} for testing",
        "classes": str(len(train.classes)),
        "seeds": str(args.seeds),
        "steps per cell": f"{args.budget} of 64 images",
        "probe": f"kNN (k 200, T 0.07) and logistic regression at {args.probe_size} px",
    }
    if args.detection:
        facts["detection"] = (
            f"Faster R-CNN C4, {args.detection_iterations} iterations of 4 images, "
            f"{100 * args.detection_share:g} % of the labelled images, one fine-tuning per "
            f"pre-training"
        )
    write_document(measured, args.document, facts)
    print(f"written to {args.document}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""The papers' figures, at a size that two cores carry, as docs/evidence.md.

    python benchmarks/evidence.py --data DIR [--test DIR]       # folders of class folders
    python benchmarks/evidence.py --data DIR --only momentum --seeds 5
    python benchmarks/evidence.py --document-only               # from what has been run so far

Cells (one training, one seed) run side by side, one single-threaded process each. Each has a folder
under --output; one that has finished is not run again, so the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.evidence_cell import RESULT, SPEC, config
from benchmarks.evidence_document import Measured, write_document
from benchmarks.evidence_figures import STEPS, figures
from benchmarks.evidence_terms import Cell, Figure
from pretrain.errors import UserError, run_tool
from pretrain.files import replace_text
from pretrain.probe.images import LabelledImages, open_train_and_test, stratified_split
from pretrain.progress import clock

ROOT = Path(__file__).resolve().parents[1]

# Fine-tuning at the size of docs/results.md: smaller images still, and few proposals.
DETECTION = (
    "SOLVER.IMS_PER_BATCH 4 SOLVER.BASE_LR 0.01 TEST.PRECISE_BN.NUM_ITER 20 "
    "INPUT.MIN_SIZE_TRAIN (128,144,160) INPUT.MAX_SIZE_TRAIN 240 "
    "INPUT.MIN_SIZE_TEST 160 INPUT.MAX_SIZE_TEST 240 "
    "MODEL.ANCHOR_GENERATOR.SIZES [[8,16,32,64,128]] "
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE 64 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 "
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN 400 MODEL.RPN.POST_NMS_TOPK_TRAIN 100 "
    "MODEL.RPN.PRE_NMS_TOPK_TEST 400 MODEL.RPN.POST_NMS_TOPK_TEST 100 "
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7"
).split()


@dataclass(frozen=True)
class Job:
    """Commands to run one after the other, in a folder; done once ``done`` is there."""

    name: str
    folder: Path
    commands: Sequence[Sequence[str]]
    done: Path

    def run(self) -> float:
        """Run the commands with one thread each, all they say going to log.txt.

        Returns:
            seconds.

        Raises:
            UserError: a command failed; its last lines.
        """
        began = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        log = self.folder / "log.txt"
        for command in self.commands:
            with log.open("a") as file:
                status = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
                ).returncode
            if status or (command is self.commands[-1] and not self.done.exists()):
                tail = " | ".join(log.read_text(errors="replace").splitlines()[-3:])
                raise UserError(f"{self.name} ended with status {status} ({log}): {tail}")
        return time.monotonic() - began


def run_jobs(jobs: Sequence[Job], parallel: int, what: str) -> list[str]:
    """Run what is not done, ``parallel`` at a time; return the failures, one sentence each."""
    todo = [job for job in jobs if not job.done.exists()]
    print(f"{what}: {len(jobs)} in all, {len(jobs) - len(todo)} of them done", flush=True)
    failures: list[str] = []
    began = time.monotonic()
    with ThreadPoolExecutor(parallel) as pool:
        running: dict[Future[float], Job] = {pool.submit(job.run): job for job in todo}
        finished = 0
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, finished = running.pop(future), finished + 1
                    left = (time.monotonic() - began) / finished * (len(todo) - finished)
                    try:
                        end = f"{clock(future.result())}"
                    except UserError as error:
                        failures.append(str(error))
                        end = f"FAILED: {error}"
                    print(
                        f"  {finished}/{len(todo)}  {job.name}  {end}  eta {clock(left)}",
                        flush=True,
                    )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # children got the same signal
            raise
    return failures


def write_pool(images: LabelledImages, size: int, output: Path) -> str:
    """List the images to pre-train on, as many of each class: ``size`` of the training images, the
    same for every seed; all of them if there are no more. No test image is among them."""
    rows = np.arange(len(images))
    if size < len(images):
        _, rows = stratified_split(images.labels, size / len(images), seed=0)
    path = output / f"pool-{len(rows)}.txt"
    output.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(f"{os.path.abspath(images.name(row))}\n" for row in rows.tolist()))
    return str(path)


def cell_folder(output: Path, cell: Cell, seed: int, how: dict[str, Any]) -> Path:
    """A folder for what is trained and measured, whatever figure and label it comes under."""
    cfg = config(dict(cell.overrides), seed)
    key = json.dumps([cfg.dump(), cell.trained, cell.script, how], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    return output / "cells" / f"{cfg.METHOD if cell.trained else 'random'}-s{seed}-{digest}"


def cell_job(folder: Path, cell: Cell, seed: int, how: dict[str, Any], write: bool = True) -> Job:
    """The job of one cell, whose specification is written now if it is to be run."""
    spec = {"overrides": dict(cell.overrides), "seed": seed, "trained": cell.trained, **how}
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / SPEC, json.dumps(spec, indent=1) + "\n")
    command = [sys.executable, str(ROOT / "benchmarks" / cell.script), str(folder)]
    return Job(f"{cell.label} seed {seed}", folder, [command], folder / RESULT)


def detection_jobs(
    figure: Figure, folders: dict[tuple[str, int], Path], args: argparse.Namespace
) -> list[Job]:
    """Convert and fine-tune every cell of a figure; from untrained weights, in the same network."""
    iterations, share = args.detection_iterations, args.detection_share
    jobs = []
    for (label, seed), folder in folders.items():
        cell = next(cell for cell in figure.cells if cell.label == label)
        weights = folder / "weights.pkl"
        convert = [sys.executable, str(ROOT / "tools" / "convert.py")]
        convert += [str(folder / "run" / "checkpoint_last.pth"), "-o", str(weights)]
        key = "MODEL.WEIGHTS" if cell.trained else "MODEL.ARCHITECTURE_FROM"
        out = folder / detection_name(args)
        train = [sys.executable, str(ROOT / "tools" / "train_net.py")]
        train += ["--config", "VOC" if cell.trained else "VOC-random", "--resume"]
        train += ["--train-data", args.detection[0], "--test-data", args.detection[1]]
        train += ["--output-dir", str(out), "DATASETS.LABEL_SHARE", str(share)]
        train += [key, str(weights), "SEED", str(seed), "SOLVER.MAX_ITER", str(iterations)]
        commands = [[*train, *DETECTION]]
        if not weights.exists():
            commands.insert(0, convert)
        jobs.append(Job(f"detection: {label} seed {seed}", folder, commands, out / "results.json"))
    return jobs


def detection_name(args: argparse.Namespace) -> str:
    """Name of a cell's folder for its detector."""
    return f"detection-{args.detection_iterations}-share-{args.detection_share:g}"


def measurements(
    cells: dict[tuple[str, int], Path], detection: str
) -> dict[str, list[dict[str, float]]]:
    """Results of each label, one dictionary a finished seed."""
    found: dict[str, list[dict[str, float]]] = {}
    for (label, seed), folder in cells.items():
        if (folder / RESULT).exists():
            result = {"seed": seed, **json.loads((folder / RESULT).read_text())}
            detected = folder / detection / "results.json"
            if detected.exists():
                boxes = json.loads(detected.read_text())["bbox"]
                result |= {"AP": boxes["AP"], "AP50": boxes["AP50"]}
            found.setdefault(label, []).append(result)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [figure.name for figure in figures()]
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--data", metavar="DIR", required=True, help="class folders to train on, without labels")
    add("--test", metavar="DIR", help="class folders to test on (default: hold out a fifth)")
    add("--detection", nargs=2, metavar="SPEC", help="training and test data of the detectors")
    add("--only", nargs="+", choices=names, default=names, metavar="FIGURE", help=", ".join(names))
    add("--seeds", type=int, default=3, metavar="N", help="3")
    add("--budget", type=int, default=STEPS, metavar="STEPS", help=f"of a cell ({STEPS})")
    add("--detection-seeds", type=int, default=3, metavar="N", help="fine-tuned (3)")
    add("--detection-iterations", type=int, default=300, metavar="N", help="300")
    add("--detection-share", type=float, default=1.0, metavar="S", help="of the labels (1)")
    add("--pool", type=int, default=4000, metavar="N", help="images to pre-train on (4000)")
    add("--probe-size", type=int, default=64, metavar="PX", help="images are probed at (64)")
    add("--parallel", type=int, default=2, metavar="N", help="cells at a time (2)")
    add("--output", type=Path, default=Path("runs/evidence"), metavar="DIR", help="runs/evidence")
    add("--document", type=Path, default=ROOT / "docs" / "evidence.md", metavar="FILE")
    add("--document-only", action="store_true", help="run nothing")
    add("--plan", action="store_true", help="say what would be run, and stop")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the document from all that is there."""
    args = parser().parse_args(argv)
    return run_tool(lambda: evidence(args), "stopped: the same command goes on from here")


def evidence(args: argparse.Namespace) -> int:
    """`main` without the words about how it ended."""
    train, test = open_train_and_test(args.data, args.test)
    output = args.output.resolve()
    how = {
        "pool": write_pool(train, args.pool, output),
        "train": str(Path(args.data).resolve()),
        "test": str(Path(args.test).resolve()) if args.test else None,
        "holdout": 0.2,
        "probe_size": args.probe_size,
    }
    everything = figures(args.budget)
    folders = {
        figure.name: {
            (cell.label, seed): cell_folder(output, cell, seed, how)
            for seed in range(args.seeds)
            for cell in figure.cells
        }
        for figure in everything
    }
    wanted = [figure for figure in everything if figure.name in args.only]
    only_look = args.plan or args.document_only
    jobs: dict[Path, Job] = {}
    for seed in range(args.seeds):  # a first seed of everything comes before any second one
        for figure in wanted:
            for cell in figure.cells:
                folder = folders[figure.name][cell.label, seed]
                if folder not in jobs:
                    jobs[folder] = cell_job(folder, cell, seed, how, write=not only_look)
    if args.plan:
        print(
            "\n".join(f"{'done' if j.done.exists() else 'todo'}  {j.folder}" for j in jobs.values())
        )
        return 0
    failures = []
    if not args.document_only:
        failures = run_jobs(list(jobs.values()), args.parallel, "cells")
        for figure in wanted:
            if figure.detection and args.detection:
                failures += detect(figure, folders[figure.name], args)
    measured = [
        Measured(figure, measurements(folders[figure.name], detection_name(args)))
        for figure in everything
    ]
    facts = {
        "images to pre-train on": Path(how["pool"]).stem.partition("-")[2],
        "images to probe with": f"{len(train):,} for training, {len(test):,} for testing",
        "classes": str(len(train.classes)),
        "seeds": str(args.seeds),
        "steps a cell": f"{args.budget} of 64 images",
        "probe": f"kNN (k 200, T 0.07) and logistic regression at {args.probe_size} px",
    }
    if args.detection:
        facts["detection"] = (
            f"Faster R-CNN C4, {args.detection_iterations} iterations of 4 images, "
            f"{100 * args.detection_share:g} % of the labelled images, one fine-tuning a "
            f"pre-training"
        )
    write_document(measured, args.document, facts)
    print(f"written to {args.document}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def detect(
    figure: Figure, folders: dict[tuple[str, int], Path], args: argparse.Namespace
) -> list[str]:
    """Fine-tune what has been pre-trained; return the failures."""
    ready = {
        (label, seed): folder
        for (label, seed), folder in folders.items()
        if seed < args.detection_seeds and (folder / RESULT).exists()
    }
    jobs = detection_jobs(figure, ready, args)
    return run_jobs(jobs, args.parallel, "detectors")


if __name__ == "__main__":
    sys.exit(main())

"""The whole pipeline on generated images, each step run by the command that a user would type.

    images -> pre-train -> convert -> fine-tune twice -> evaluate -> table and pictures

The detectors initialised from MoCo's weights and from random ones share data, schedule, seed and
network. They are trained at the same time, each on its share of the cores.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from moco_common.errors import UserError
from moco_common.files import make_folder
from moco_common.hardware import cpu_count
from moco_det.demo.scene_dataset import write_scenes
from moco_det.report.build import build_report
from moco_det.report.curves import training_curves
from moco_det.report.example_images import compare_runs
from moco_det.report.runs import read_runs

Command = Sequence[object]


@dataclass(frozen=True)
class Demo:
    """One run of the pipeline. Finished steps are not repeated.

    Args:
        folder: output directory.
        tools: folder of the command-line tools.
        seed: seed of the images, the pre-training and both fine-tunings.
        scenes: numbers of images, for `write_scenes`.
        pretraining: KEY VALUE pairs for the pre-training.
        fine_tuning: KEY VALUE pairs for both fine-tunings.
        quiet: print warnings only.
    """

    folder: Path
    tools: Path
    seed: int = 0
    scenes: Mapping[str, int] = field(default_factory=dict)
    pretraining: Sequence[str] = ()
    fine_tuning: Sequence[str] = ()
    quiet: bool = False

    def run(self) -> None:
        """Run all steps, then print the table and the paths of the pictures.

        Raises:
            UserError: a step failed; its own message has been printed.
        """
        start = time.monotonic()
        make_folder(self.folder, "--output-dir")
        data, pretrained = self.folder / "scenes", self.folder / "pretrain-moco"
        weights = self.folder / "moco.pkl"
        detectors = {
            "random weights": self.folder / "detect-random",
            "MoCo weights": self.folder / "detect-moco",
        }
        self.head("1/5  draw the images")
        self.draw(data)
        self.head("2/5  pre-train on the unlabelled images")
        self.pretrain(data / "unlabelled", pretrained)
        self.head("3/5  convert to Detectron2 and verify every tensor")
        self.tools_side_by_side(
            {"": ["convert.py", pretrained / "checkpoint_last.pth", "-o", weights]}
        )
        self.head(
            "4/5  fine-tune Faster R-CNN C4 on the labelled images, from both initialisations"
        )
        self.fine_tune(data / "voc", weights, *detectors.values())
        self.head("5/5  write the report and the pictures")
        self.report(data / "voc", pretrained, detectors)
        self.head(f"done in {(time.monotonic() - start) / 60:.1f} minutes")

    def draw(self, folder: Path) -> None:
        """Write the scenes and log the progress."""
        start = logged = time.monotonic()
        for done, total in write_scenes(folder, seed=self.seed, **self.scenes):
            now = time.monotonic()
            if now - logged > 3 or done == total:
                eta = (now - start) / done * (total - done)
                self.say(f"  {done}/{total} images  eta {eta:.0f} s")
                logged = now

    def pretrain(self, images: Path, folder: Path) -> None:
        """Pre-train with a process on each of two GPUs; without GPUs, on each of two cores, which
        is faster than one process with two threads."""
        processes = min(2, torch.cuda.device_count() or cpu_count())
        resume = ["--resume"] if folder.is_dir() else []  # an earlier walk was here
        self.tools_side_by_side(
            {
                "": [
                    *("pretrain.py", "--config", "scenes", "--data", images),
                    *("--output-dir", folder, "--num-gpus", processes, *resume),
                    *("SEED", self.seed, *self.pretraining),
                ]
            },
            processes=processes,
        )

    def fine_tune(self, voc: Path, weights: Path, random: Path, moco: Path) -> None:
        """Fine-tune from ``weights``, and from random weights in the same network."""
        starts = {
            random: ("scenes-random", "MODEL.ARCHITECTURE_FROM"),
            moco: ("scenes", "MODEL.WEIGHTS"),
        }
        commands = {
            folder.name.removeprefix("detect-"): [
                *("train_net.py", "--config", config),
                *("--train-data", f"voc:{voc}:train", "--test-data", f"voc:{voc}:test"),
                *("--output-dir", folder, "--resume", key, weights),
                *("SEED", self.seed, *self.fine_tuning),
            ]
            for folder, (config, key) in starts.items()
            if not (folder / "results.json").exists()
        }
        self.tools_side_by_side(commands, processes=len(commands))

    def report(self, voc: Path, pretrained: Path, detectors: Mapping[str, Path]) -> None:
        """Write the report of the pre-training and the detectors, and print its summary."""
        found = "ground truth and detections on test images"
        pictures = {
            "pre-training": self.folder / "pretraining.png",
            "fine-tuning": self.folder / "fine-tuning.png",
            found: self.folder / "detections.png",
        }
        curves, losses, detections = pictures.values()
        training_curves({"pre-training": pretrained}, curves)
        training_curves(detectors, losses)
        compare_runs(f"voc:{voc}:test", detectors, detections, num_images=6, seed=self.seed)
        runs = read_runs([pretrained, *detectors.values()])
        report = build_report(runs, self.folder / "report", pictures={found: detections})
        self.say(report.summary())
        report.write(self.folder / "report")
        for caption, path in pictures.items():
            self.say(f"  {caption}: {path}")
        self.say(f"  all on one page: {self.folder / 'report' / 'report.html'}")

    def tools_side_by_side(self, commands: Mapping[str, Command], processes: int = 1) -> None:
        """Run commands at the same time, each line of output prefixed by the name of its command.

        Args:
            commands: name -> file name of a tool, and its arguments.
            processes: number of processes that share the cores, over all commands.
        """
        threads = max(1, cpu_count() // max(1, processes))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        indent = max(map(len, commands), default=0)
        out = sys.stderr if self.quiet else sys.stdout  # a quiet tool prints warnings only
        running = []
        for name, (tool, *arguments) in commands.items():
            words = [str(argument) for argument in arguments]
            self.say(f"  $ {shlex.join([f'tools/{tool}', *words])}")
            words += ["--quiet"] if self.quiet else []
            process = subprocess.Popen(
                [sys.executable, str(self.tools / str(tool)), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            relay = threading.Thread(target=_relay, args=(process, name.ljust(indent), out))
            relay.start()
            running.append((tool, process, relay))
        try:
            for _, process, relay in running:
                process.wait()
                relay.join()
        finally:
            for _, process, _ in running:
                process.terminate()
        for tool, process, _ in running:
            if process.returncode:
                raise UserError(
                    f"{tool} ended with status {process.returncode}, for the reason above; fix it "
                    "and repeat the command, which resumes there."
                )

    def head(self, text: str) -> None:
        """Print the name of a step, after an empty line."""
        self.say(f"\n{text}")

    def say(self, text: str) -> None:
        """Print a line, unless the demo is quiet."""
        if not self.quiet:
            print(text, flush=True)


def _relay(process: subprocess.Popen[str], name: str, out: TextIO) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"  {name}{'  ' if name else ''}{line}", end="", file=out, flush=True)

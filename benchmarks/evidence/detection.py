"""Detectors of the evidence: convert the weights of a cell, fine-tune them, read the AP."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence.cell import RESULT
from benchmarks.evidence.jobs import ROOT, Job
from benchmarks.evidence.terms import Figure

# Settings for fine-tuning at the size of docs/results.md: smaller images and few proposals.
SMALL = (
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
class Detectors:
    """Settings for fine-tuning and testing the cells of a figure.

    Attributes:
        protocol: protocol for trained weights; its ``-random`` variant is used for untrained ones.
        train, test: data specs, as for `tools/train_net.py`.
        iterations: length of a fine-tuning.
        share: share of the labelled images, in (0, 1].
        settings: KEY VALUE pairs that reduce the size.
        seeds: number of seeds of each cell that are fine-tuned.
    """

    protocol: str
    train: str
    test: str
    iterations: int
    share: float = 1.0
    settings: Sequence[str] = ()
    seeds: int = 3

    @property
    def name(self) -> str:
        """Name of the detector's folder within the folder of a cell."""
        return f"detection-{self.iterations}-share-{self.share:g}"

    def results(self, folder: Path) -> dict[str, float]:
        """Return AP and AP50 of a cell's detector; empty if it has not finished."""
        path = folder / self.name / "results.json"
        if not path.exists():
            return {}
        boxes = json.loads(path.read_text())["bbox"]
        return {"AP": boxes["AP"], "AP50": boxes["AP50"]}

    def jobs(self, figure: Figure, folders: Mapping[tuple[str, int], Path]) -> list[Job]:
        """Return the jobs that convert and fine-tune every finished cell.

        Untrained weights use the network of the converted file of their own cell.
        """
        trained = {cell.label: cell.trained for cell in figure.cells}
        return [
            self._job(label, seed, folder, trained[label])
            for (label, seed), folder in folders.items()
            if seed < self.seeds and (folder / RESULT).exists()
        ]

    def _job(self, label: str, seed: int, folder: Path, trained: bool) -> Job:
        weights, out = folder / "weights.pkl", folder / self.name
        convert = [sys.executable, str(ROOT / "tools" / "convert.py")]
        convert += [str(folder / "run" / "checkpoint_last.pth"), "-o", str(weights)]
        protocol = self.protocol if trained else f"{self.protocol}-random"
        key = "MODEL.WEIGHTS" if trained else "MODEL.ARCHITECTURE_FROM"
        train = [sys.executable, str(ROOT / "tools" / "train_net.py")]
        train += ["--config", protocol, "--resume", "--output-dir", str(out)]
        train += ["--train-data", self.train, "--test-data", self.test]
        train += ["DATASETS.LABEL_SHARE", str(self.share), key, str(weights), "SEED", str(seed)]
        train += ["SOLVER.MAX_ITER", str(self.iterations), *self.settings]
        commands = [train] if weights.exists() else [convert, train]
        return Job(f"detection: {label} seed {seed}", folder, commands, out / "results.json")

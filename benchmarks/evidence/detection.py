"""The evidence's detectors: convert what a cell has trained, fine-tune it, read its AP."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence.cell import RESULT
from benchmarks.evidence.jobs import ROOT, Job
from benchmarks.evidence.terms import Figure

# Fine-tuning at the size of docs/results.md: smaller images still, and few proposals.
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
    """How the cells of a figure are fine-tuned and tested.

    Attributes:
        protocol: from weights; its ``-random`` sibling is for untrained ones.
        train, test: data, as `tools/train_net.py` takes them.
        iterations, share: length, and share of the labelled images, from 0 to 1.
        settings: KEY VALUE pairs that make it small.
        seeds: how many of the cells' seeds are fine-tuned.
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
        """Of the folder of a cell's detector."""
        return f"detection-{self.iterations}-share-{self.share:g}"

    def results(self, folder: Path) -> dict[str, float]:
        """AP and AP50 of a cell's detector; nothing where there is none yet."""
        path = folder / self.name / "results.json"
        if not path.exists():
            return {}
        boxes = json.loads(path.read_text())["bbox"]
        return {"AP": boxes["AP"], "AP50": boxes["AP50"]}

    def jobs(self, figure: Figure, folders: Mapping[tuple[str, int], Path]) -> list[Job]:
        """Convert and fine-tune every cell that has finished; untrained weights in the very network
        of the others."""
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

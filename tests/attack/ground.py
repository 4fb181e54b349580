"""Honest inputs on which every try stands: photographs, data sets, two runs, converted weights."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moco_det.demo.scene_dataset import write_scenes
from tests.attack.arena import Arena, Try
from tests.conftest import NARROW, QUICK
from tests.pretrain.probe_data import write_classes
from tests.pretrain.runs import TINY

PRETRAIN = [*TINY, "MOCO.QUEUE_SIZE", "8", "SOLVER.MAX_ITER", "2", "CHECKPOINT.PERIOD", "1"]
DETECT = [*NARROW, *QUICK, "TEST.PRECISE_BN.ENABLED", "False", "SOLVER.CHECKPOINT_PERIOD", "1"]


@dataclass(frozen=True)
class Ground:
    """Read-only inputs; what a try changes is copied into its sandbox."""

    root: Path

    @property
    def photographs(self) -> Path:
        return self.root / "photographs"

    @property
    def voc(self) -> Path:
        return self.root / "scenes" / "voc"

    @property
    def coco(self) -> Path:
        return self.root / "scenes" / "coco"

    @property
    def pretraining(self) -> Path:
        return self.root / "pretraining"

    @property
    def detection(self) -> Path:
        return self.root / "detection"

    @property
    def backbone(self) -> Path:
        return self.root / "backbone.pkl"


def build_ground(root: Path) -> Ground:
    """Write the data and make the runs, each in a process of its own."""
    ground = Ground(root)
    arena = Arena()
    (root / "sandboxes").mkdir(parents=True)

    def make(name: str, function: Callable[[list[str]], Any], argv: list[Any]) -> None:
        sandbox = root / "sandboxes" / name
        outcome = arena.run(Try(name, function, [str(word) for word in argv], sandbox))
        if "exit 0" not in outcome.text:
            raise SystemExit(f"the honest run {name} failed:\n{outcome.text}")
        for made in sandbox.iterdir():
            shutil.move(made, root / made.name)

    make("photographs", lambda argv: write_classes(Path("photographs"), 4) and None, [])
    make("scenes", _write_scenes, [])
    from tools import convert, pretrain, train_net

    words = ["--config", "moco-v2", "--data", ground.photographs, "--output-dir", "pretraining"]
    make("pretraining", pretrain.main, [*words, *PRETRAIN, "MODEL.DEPTH", "50"])
    last = ground.pretraining / "checkpoint_last.pth"
    make("backbone", convert.main, [last, "-o", "backbone.pkl"])
    words = ["--config", "scenes-random", "--train-data", f"voc:{ground.voc}:train"]
    words += ["--test-data", f"voc:{ground.voc}:test", "--output-dir", "detection"]
    make("detection", train_net.main, [*words, *DETECT])
    return ground


def _write_scenes(argv: list[str]) -> None:
    for _ in write_scenes(Path("scenes"), unlabelled=0, train=4, test=2, size=64, processes=1):
        pass


def pretraining_checkpoint(ground: Ground) -> dict[str, Any]:
    """The honest checkpoint of the pre-training run, to be changed."""
    from pretrain.checkpoint import format as checkpoint

    return checkpoint.load(ground.pretraining / "checkpoint_last.pth")


def detection_checkpoint(ground: Ground) -> dict[str, Any]:
    """The honest checkpoint of the fine-tuning run, to be changed."""
    return dict(torch.load(ground.detection / "model_final.pth", weights_only=True))


def coco_content(ground: Ground, split: str = "train") -> dict[str, Any]:
    """The honest annotation file, to be changed."""
    return dict(json.loads((ground.coco / f"instances_{split}.json").read_text()))

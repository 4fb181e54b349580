"""Time of a fine-tuning step, compared with Detectron2's own training loop.

    python benchmarks/finetune.py [--quick] [--protocol VOC-random] [--full]

Detectron2's ``SimpleTrainer`` and the step of this project train the same network from the same
weights, on the same batches of generated scenes, with the same random numbers. Their losses must
be equal to the last bit in every step. They take turns within each round; medians are reported.
The network is narrow and its images are small, so that the cost around the network shows; --full
takes the network and the image sizes of the protocol.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from benchmarks.turns import take_turns
from moco_det.config.protocols import load_config
from moco_det.data.build import settle_data
from moco_det.data.dataset_mapper import build_train_mapper
from moco_det.data.samplers import TRAINING, Batch, load_training_set, seed_model
from moco_det.demo.gpu_check import NARROW
from moco_det.demo.scene_dataset import write_scenes
from moco_det.engine.optimizer import build_optimizer
from moco_det.engine.train_step import TrainStep
from moco_det.modeling.detector import build_detector

Losses = list[dict[str, float]]


def configured(protocol: str, folder: Path, full: bool) -> CfgNode:
    """Return the config of a protocol on scenes that are written to a folder."""
    for _ in write_scenes(folder, unlabelled=1, train=16, test=2, processes=1):
        pass
    words = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "BN", "DATALOADER.NUM_WORKERS", "0"]
    words += [] if full else [str(word) for pair in NARROW.items() for word in pair]
    cfg = load_config(protocol, [*words, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001"])
    masks = f"coco:{folder}/coco/instances_train.json:{folder}/voc/JPEGImages"
    spec = masks if cfg.MODEL.MASK_ON else f"voc:{folder}/voc:train"
    settle_data(cfg, explicit=(), train_data=(spec,), test_data=None, eval_only=False)
    return cfg


def read_batches(cfg: CfgNode, count: int) -> list[Batch]:
    """Return the first batches of training, augmented."""
    loader = load_training_set(cfg).batches(
        build_train_mapper(cfg),
        cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED,
        num_workers=0,
        sequence=TRAINING,
        numbers=range(count),
    )
    return [batch for _, batch in loader]


class Ours:
    """The step of this project, with its record of the losses."""

    def __init__(self, cfg: CfgNode, model: torch.nn.Module, batches: Sequence[Batch]) -> None:
        self.step = TrainStep(
            model,
            lambda first, last: iter(enumerate(cycle(batches))),
            build_optimizer(cfg, model),
            seed=cfg.SEED,
        )
        self.step.start(0, sys.maxsize)
        self.storage = EventStorage()
        self.losses: Losses = []

    def __call__(self) -> None:
        with self.storage:
            found = self.step(self.storage.iter)
            self.storage.put_scalars(**found)
        self.storage.step()
        self.losses.append({k: v for k, v in found.items() if k.startswith("loss_")})


class Detectron2s:
    """Detectron2's ``SimpleTrainer``, with the random numbers that `Ours` has."""

    def __init__(self, cfg: CfgNode, model: torch.nn.Module, batches: Sequence[Batch]) -> None:
        def seeded() -> Iterator[Batch]:
            for number, batch in enumerate(cycle(batches)):
                seed_model(cfg.SEED, TRAINING, number)
                yield batch

        self.trainer = SimpleTrainer(model, seeded(), solver.build_optimizer(cfg, model))
        self.storage = EventStorage()
        self.losses: Losses = []

    def __call__(self) -> None:
        self.trainer.iter = self.storage.iter
        with self.storage:
            self.trainer.run_step()
        found = self.storage.latest()
        self.storage.step()
        self.losses.append({k: v for k, (v, _) in found.items() if k.startswith("loss_")})


def compare(protocol: str, rounds: int, full: bool) -> float:
    """Print the times of both; return the ratio of the medians.

    Raises:
        AssertionError: a loss differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = configured(protocol, Path(folder), full)
        batches = read_batches(cfg, 8)
    torch.manual_seed(0)
    ours = build_detector(cfg).train()
    theirs = build_model(cfg).train()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    calls = {"Detectron2": Detectron2s(cfg, theirs, batches), "ours": Ours(cfg, ours, batches)}
    times = take_turns(calls, rounds)
    assert calls["ours"].losses == calls["Detectron2"].losses, "the losses differ"
    print(
        f"losses of {rounds + 1} steps equal to the last bit: {', '.join(calls['ours'].losses[0])}"
    )
    print(f"step of {protocol}, batch 2, {torch.get_num_threads()} threads")
    for name, values in times.items():
        print(
            f"  {name:24s} {statistics.median(values):9.2f} ms"
            f"  ({min(values):.2f} to {max(values):.2f}, n = {rounds})"
        )
    return statistics.median(times["Detectron2"]) / statistics.median(times["ours"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds, not 101")
    parser.add_argument("--protocol", default="VOC-random", help="protocol (VOC-random)")
    parser.add_argument("--full", action="store_true", help="network and images of full size")
    args = parser.parse_args(argv)
    ratio = compare(args.protocol, 2 if args.quick else 101, args.full)
    print(f"ratio finetune_step {ratio:.2f}")


if __name__ == "__main__":
    main()

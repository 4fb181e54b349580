"""The figures that hold all methods beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.evidence.terms import RANDOM, Cell, Expectation, Figure

SCENES_STEPS, SCENES_WARMUP = 600, 80


def methods(base: dict[str, Any]) -> Figure:
    """On the images of --data, and as detectors on those of --detection."""
    cells = _each_method(base)
    return Figure(
        "methods",
        "All methods at the same number of images seen",
        "One data set, encoder, optimiser (SGD), learning rate, views and number of images; each"
        " method has its own head and loss. This is no contest of methods, whose recipes were "
        "made for batches of thousands, hundreds of epochs and views of their own (SwAV: "
        "multi-crop), but a test whether each of them learns on one harness. Random weights have "
        "their BN statistics fitted to the images. Where there is an AP, the weights were "
        "converted and fine-tuned as a detector, every layer trained, each seed from a "
        "pre-training of its own; detectors from random weights start as Detectron2 starts them.",
        cells,
        ("knn", "linear", "AP", "AP50"),
        _above_random(cells, ("knn", "linear", "AP")),
        best=False,
        detection=True,
    )


def scenes(scale: float) -> Figure:
    """On the demo's images, unlabelled ones and labelled ones of one kind."""
    steps, warmup = round(SCENES_STEPS * scale), max(1, round(SCENES_WARMUP * scale))
    cells = _each_method(
        {
            "INPUT.CROP_SIZE": 64,
            "SOLVER.BASE_LR": 0.05,
            "SOLVER.MAX_ITER": steps,
            "SOLVER.WARMUP_ITERS": warmup,
            "SWAV.FREEZE_ITERS": warmup,
        }
    )
    return Figure(
        "scenes",
        "All methods where the pool is of the task",
        "The demo's generated scenes: 4,000 without labels to pre-train on, 300 labelled ones for "
        "the detector (150 iterations of 4), 200 to test it on. Encoder, heads and losses are those"
        f" above; {steps:,} steps of 64 crops of 64 px, at a learning rate of 0.05.",
        cells,
        ("AP", "AP50"),
        _above_random(cells, ("AP", "AP50")),
        detection=True,
        data="scenes",
    )


def _each_method(base: dict[str, Any]) -> list[Cell]:
    # Statistics over the whole batch, as the last three papers have them.
    synchronised = {**base, "MODEL.SYNC_BN": True}
    # Of SwAV the better of three settings tried on one seed: few prototypes need no queue.
    few = {"SWAV.PROTOTYPES": 32, "SWAV.QUEUE_SIZE": 0, "SWAV.EPSILON": 0.05}
    return [
        Cell(RANDOM, base, trained=False),
        Cell("MoCo", base),
        Cell("end-to-end", {**base, "METHOD": "end-to-end"}),
        Cell("memory bank", {**base, "METHOD": "memory-bank"}),
        Cell("SimCLR", {**synchronised, "METHOD": "simclr"}),
        Cell("BYOL", {**synchronised, "METHOD": "byol"}),
        Cell("SwAV, two crops", {**synchronised, **few, "METHOD": "swav"}),
    ]


def _above_random(cells: Sequence[Cell], metrics: Sequence[str]) -> tuple[Expectation, ...]:
    return tuple(
        Expectation("it has learnt something", cell.label, RANDOM, metric)
        for metric in metrics
        for cell in cells
        if cell.trained
    )

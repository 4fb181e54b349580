"""The figures that compare all methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.evidence.terms import RANDOM, Cell, Expectation, Figure

SCENES_STEPS, SCENES_WARMUP = 600, 80


def methods(base: dict[str, Any]) -> Figure:
    """Return the comparison on the images of --data, and as detectors on those of --detection."""
    cells = _each_method(base)
    return Figure(
        "methods",
        "All methods at the same number of images seen",
        "All methods share the data set, encoder, optimiser (SGD), learning rate, views and "
        "number of images; each has its own head and loss. This is not a contest: the methods' "
        "recipes were made for batches of thousands, hundreds of epochs and their own views "
        "(SwAV: multi-crop). It tests whether each method learns under the same conditions. "
        "Random weights have BN statistics fitted to the images. For AP, the weights were "
        "converted and fine-tuned as a detector with every layer trained, each seed from its own "
        "pre-training; detectors from random weights use Detectron2's initialisation.",
        cells,
        ("knn", "linear", "AP", "AP50"),
        _above_random(cells, ("knn", "linear", "AP")),
        best=False,
        detection=True,
    )


def scenes(scale: float) -> Figure:
    """Return the comparison on the demo's images, where unlabelled and labelled ones are alike."""
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
        "All methods pre-trained on images of the task",
        "The demo's generated scenes: 4,000 unlabelled for pre-training, 300 labelled for the "
        "detector (150 iterations of 4 images), 200 for testing. Encoder, heads and losses are as "
        f"above; {steps:,} steps of 64 crops of 64 px, at a learning rate of 0.05.",
        cells,
        ("AP", "AP50"),
        _above_random(cells, ("AP", "AP50")),
        detection=True,
        data="scenes",
    )


def _each_method(base: dict[str, Any]) -> list[Cell]:
    # BN statistics over the whole batch, as in the papers of the last three methods.
    synchronised = {**base, "MODEL.SYNC_BN": True}
    # The best of three settings of SwAV tried on one seed: few prototypes need no queue.
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
        Expectation("pre-training helps", cell.label, RANDOM, metric)
        for metric in metrics
        for cell in cells
        if cell.trained
    )

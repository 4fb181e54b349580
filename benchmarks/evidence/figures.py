"""The figures of the evidence, their cells, and the expectations raised by the papers."""

from __future__ import annotations

from typing import Any

from benchmarks.evidence.methods import methods, scenes
from benchmarks.evidence.terms import Cell, Expectation, Figure

STEPS, BATCH, WARMUP = 400, 64, 50  # as in evidence.yaml
LEAK_STEPS = 2000
NEGATIVES, BATCHES = (64, 512, 2048), (32, 64, 256)


def figures(steps: int = STEPS) -> list[Figure]:
    """Return all figures, for cells of ``steps`` steps of `BATCH` images."""
    scale = steps / STEPS
    base: dict[str, Any] = {}
    if steps != STEPS:
        base = {"SOLVER.MAX_ITER": steps, "SOLVER.WARMUP_ITERS": max(1, round(WARMUP * scale))}
        base["SWAV.FREEZE_ITERS"] = base["SOLVER.WARMUP_ITERS"]
        base["SWAV.QUEUE_START_ITER"] = steps // 4
    return [
        _mechanisms(base, steps),
        _momentum(base),
        _shuffling(base),
        _leak(max(50, round(LEAK_STEPS * scale))),
        _steps_to_v2(base),
        _plateau(base),
        methods(base),
        scenes(scale),
    ]


def _mechanisms(base: dict[str, Any], steps: int) -> Figure:
    cells = [Cell(f"MoCo, K {k}", {**base, "MOCO.QUEUE_SIZE": k}, k, "MoCo") for k in NEGATIVES]
    cells += [
        Cell(
            f"memory bank, K {k}",
            {**base, "METHOD": "memory-bank", "BANK.NEGATIVES": k},
            k,
            "memory bank",
        )
        for k in NEGATIVES
    ]
    for batch in BATCHES:  # the batch is the dictionary; the total number of images is the same
        shorter = {
            "SOLVER.BATCH_SIZE": batch,
            "SOLVER.MAX_ITER": steps * BATCH // batch,
            "SOLVER.WARMUP_ITERS": max(1, base.get("SOLVER.WARMUP_ITERS", WARMUP) * BATCH // batch),
            "MODEL.BN_GROUPS": max(2, batch // 32),
        }
        cells.append(
            Cell(
                f"end-to-end, batch {batch}",
                {**base, **shorter, "METHOD": "end-to-end"},
                batch - 1,
                "end-to-end",
            )
        )
    return Figure(
        "mechanisms",
        "Three mechanisms against the number of negatives",
        "He et al. 2020, Figure 3: one pretext task, three ways to maintain a dictionary. In the "
        "end-to-end mechanism, the dictionary is the batch, so its size is limited by memory; "
        "other batch sizes see the same number of images in fewer or more steps, at a linearly "
        "scaled learning rate. Memory is the peak resident set size of the process during "
        "training, minus that before training (interpreter, libraries).",
        cells,
        ("knn", "linear", "rss"),
        (
            Expectation("more negatives help MoCo", "MoCo, K 512", "MoCo, K 64"),
            Expectation("more negatives help the bank", "memory bank, K 512", "memory bank, K 64"),
            Expectation(
                "a larger batch helps end-to-end", "end-to-end, batch 256", "end-to-end, batch 32"
            ),
            Expectation(
                "MoCo is above the bank at the same K",
                tuple(f"MoCo, K {k}" for k in NEGATIVES),
                tuple(f"memory bank, K {k}" for k in NEGATIVES),
            ),
            Expectation(
                "a queue can be larger than a batch", "MoCo, K 2048", "end-to-end, batch 64"
            ),
            Expectation(
                "end-to-end pays for negatives in memory",
                "end-to-end, batch 256",
                "MoCo, K 2048",
                "rss",
            ),
        ),
        x_label="negatives",
        log_x=True,
    )


def _momentum(base: dict[str, Any]) -> Figure:
    cells = [
        Cell(f"m {m:g}", {**base, "MOCO.MOMENTUM": m})
        for m in (0.0, 0.9, 0.98, 0.99, 0.999, 0.9999)
    ]
    return Figure(
        "momentum",
        "The momentum of the key encoder",
        "He et al. 2020, Section 4.1, with K 4096 on ImageNet: m 0 fails, 0.9 gives 55.2, 0.99 "
        "57.8, 0.999 59.0 and 0.9999 58.9 %. Those runs have hundreds of thousands of steps. "
        "Here, 0.999 averages over more steps than the run has, so that the key encoder remains "
        "close to its initialisation.",
        cells,
        ("knn", "linear", "loss", "accuracy"),
        (
            Expectation("without momentum it is worse", "m 0.99", "m 0"),
            Expectation("slow beats fast", "m 0.99", "m 0.9"),
            Expectation("slower is better still", "m 0.999", "m 0.99"),
            Expectation(
                "a run can be too short for a high m", ("m 0.98", "m 0.99"), ("m 0.999", "m 0.9999")
            ),
        ),
        x_label="momentum",
    )


def _shuffling(base: dict[str, Any]) -> Figure:
    sides = {
        word: tuple(f"{word} shuffling, {groups} groups" for groups in (2, 8))
        for word in ("with", "without")
    }
    cells = [
        Cell(
            f"{word} shuffling, {groups} groups",
            {**base, "MODEL.BN_GROUPS": groups, "MOCO.SHUFFLE_BN": word == "with"},
        )
        for groups in (2, 8)
        for word in ("with", "without")
    ]
    return Figure(
        "shuffling",
        "Shuffling BN",
        "He et al. 2020, Section 3.3 and Figure 5: if a query and its key are normalised together "
        "with the same images, the BN statistics reveal which query belongs to which key. The "
        "contrastive accuracy then rises, and the features get worse. A BN group stands for a GPU: "
        "the batch of 64 is split into 2 or 8 groups. The accuracy is the mean over the last fifth "
        "of the run.",
        cells,
        ("accuracy", "loss", "knn", "linear"),
        (
            Expectation(
                "without it the task is easier", sides["without"], sides["with"], "accuracy"
            ),
            Expectation("with it the features are better", sides["with"], sides["without"]),
            Expectation("also under a linear probe", sides["with"], sides["without"], "linear"),
        ),
        best=False,
    )


def _leak(steps: int) -> Figure:
    cells = [
        Cell(
            f"{word} shuffling",
            {
                "MODEL.DEPTH": 18,
                "MODEL.BN_GROUPS": 8,
                "MOCO.SHUFFLE_BN": word == "with",
                "INPUT.CROP_SIZE": 32,
                "SOLVER.BASE_LR": 0.05,
                "SOLVER.MAX_ITER": steps,
            },
            script="leak.py",
        )
        for word in ("with", "without")
    ]
    return Figure(
        "leak",
        "The leak by itself",
        "A task that can only be solved by cheating: the key of an image is computed from "
        "*another* image, one of the 8 in its BN group, the query's company. All that query and "
        f"key then have in common is this company. ResNet-18 at a quarter of the width, {steps:,} "
        "steps of 64 images in 8 groups, no augmentation. Among the batch's 63 keys of other "
        "images, the nearest is from the query's own group in 11.1 % of cases by chance. Values "
        "are means over the last tenth of the run.",
        cells,
        ("company", "accuracy", "loss"),
        (Expectation("the company is learnt", cells[1].label, cells[0].label, "company"),),
        best=False,
        curve="company",
    )


def _steps_to_v2(base: dict[str, Any]) -> Figure:
    v1 = {
        **base,
        "MOCO.MLP": False,
        "MOCO.MLP_BN": False,
        "MOCO.TEMPERATURE": 0.07,
        "SOLVER.SCHEDULE": "step",
    }
    mlp = {**v1, "MOCO.MLP": True, "MOCO.TEMPERATURE": 0.2}
    head = {**mlp, "MOCO.MLP_BN": True}
    augmented = {**head, "INPUT.AUGMENTATION": "moco-v2"}
    cells = [
        Cell("v1", v1),
        Cell("v1 + MLP, as published", mlp),
        Cell("v1 + MLP with BN", head),
        Cell("v1 + MLP with BN + aug", augmented),
        Cell("v1 + MLP with BN + aug + cosine", {**augmented, "SOLVER.SCHEDULE": "cosine"}),
        Cell("v1 + MLP with BN + cosine", {**head, "SOLVER.SCHEDULE": "cosine"}),
    ]
    return Figure(
        "v2",
        "From v1 to v2",
        "Chen et al. 2020, Table 1: an MLP head (T 0.2), stronger augmentation with blur, a cosine "
        "schedule. The published head has no BN; the later rows add it.",
        cells,
        ("knn", "linear", "loss", "spread"),
        (
            Expectation("the MLP head helps", "v1 + MLP with BN", "v1"),
            Expectation("stronger augmentation helps", cells[3].label, cells[2].label),
            Expectation("the cosine helps", cells[4].label, cells[3].label),
            Expectation("BN moves the MLP head off the plateau", cells[2].label, cells[1].label),
        ),
    )


def _plateau(base: dict[str, Any]) -> Figure:
    # The v2 recipe, its learning rate of 0.03 for 256 images scaled to 64.
    published = {
        **base,
        "INPUT.AUGMENTATION": "moco-v2",
        "MOCO.MLP_BN": False,
        "MOCO.MOMENTUM": 0.999,
        "SOLVER.BASE_LR": 0.0075,
        "SOLVER.WARMUP_ITERS": 0,
    }
    changes: dict[str, dict[str, Any]] = {
        "BN in the head": {"MOCO.MLP_BN": True},
        "learning rate 0.1": {"SOLVER.BASE_LR": 0.1},
        "momentum 0.98": {"MOCO.MOMENTUM": 0.98},
        "v1's views": {"INPUT.AUGMENTATION": "moco-v1"},
        "a warm-up": {"SOLVER.WARMUP_ITERS": base.get("SOLVER.WARMUP_ITERS", WARMUP)},
        "temperature 0.07": {"MOCO.TEMPERATURE": 0.07},
        "K 64": {"MOCO.QUEUE_SIZE": 64},
    }
    first = "as published"
    cells = [Cell(first, published)]
    cells += [Cell(label, {**published, **change}) for label, change in changes.items()]
    return Figure(
        "plateau",
        "What moves v2's head off the plateau",
        "The v2 recipe as published: an MLP head without BN, T 0.2, m 0.999, v2's views, no "
        "warm-up, a learning rate of 0.03 for 256 images. With few images and few steps, its "
        "embeddings stay close together and the loss near log(K+1). The spread measures this for "
        "any K and T (0: a single point, 1: the whole sphere). Each row changes one setting of "
        "the first.",
        cells,
        ("spread", "knn", "linear", "loss"),
        tuple(
            Expectation("it moves the head", label, first, metric)
            for metric in ("spread", "knn")
            for label in changes
        ),
        best=False,
    )

"""A probe, from checkpoint to report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from moco_common import comm
from moco_common.errors import UserError
from moco_common.files import replace_text
from moco_common.text import counted
from moco_common.version import __version__
from pretrain.modeling.resnet import ResNet
from pretrain.probe.accuracy import Accuracy, accuracy
from pretrain.probe.backbone import (
    RANDOM,
    architecture,
    digest,
    fit_batch_norm,
    load_backbone,
    random_backbone,
)
from pretrain.probe.datasets import (
    LabelledImages,
    Preprocessing,
    open_train_and_test,
    read_batches,
    stratified_split,
)
from pretrain.probe.defaults import HELD_OUT, TEMPERATURE, K
from pretrain.probe.features import ArrayCache, Features, Say, extract
from pretrain.probe.knn import weighted_knn
from pretrain.probe.linear import LinearProtocol, quick_linear, rank_classes, train_linear


@dataclass(frozen=True)
class Settings:
    """Settings of a probe.

    Attributes:
        checkpoint: a file, see `load_backbone`, or "random".
        train, test: folders of class folders; without ``test``, a share ``holdout`` of ``train`` is
            held out.
        crop_size: crop size in pixels; None for that of the pre-training, or 224 if unknown.
        resize: short side before the crop, in pixels; None for 8/7 of the crop.
        fit_bn: compute the BN statistics from the training images; None to do so for random
            weights only.
        k, temperature: parameters of kNN.
        quick: fit logistic regression to the stored features.
        linear: the linear protocol to run; None to skip it. With several learning rates, a tenth of
            the training images is held out and chooses one.
        cache: folder for stored features; None to store none.
        seed: seed of the hold-out, random weights, classifiers and crops.
    """

    checkpoint: str
    train: str
    test: str | None = None
    holdout: float = 0.2
    crop_size: int | None = None
    resize: int | None = None
    fit_bn: bool | None = None
    k: int = K
    temperature: float = TEMPERATURE
    quick: bool = False
    linear: LinearProtocol | None = None
    cache: Path | None = None
    batch_size: int = 256
    workers: int = 1
    seed: int = 0


def probe(settings: Settings, cfg: CfgNode | None = None, say: Say = print) -> dict[str, Any]:
    """Evaluate a backbone; return the content of the JSON file.

    Args:
        cfg: config with the architecture and the crop size of random weights.

    Raises:
        UserError: the checkpoint, the images or the settings are invalid.
    """
    if settings.k < 1 or settings.temperature <= 0:
        raise UserError(
            f"-k is {settings.k} and --temperature {settings.temperature}: set both above 0."
        )
    backbone, crop_size = _open(settings, cfg)
    preprocessing = Preprocessing.of(settings.crop_size or crop_size, settings.resize)
    train, test = open_train_and_test(
        settings.train, settings.test, holdout=settings.holdout, seed=settings.seed
    )
    for note in (*train.source.notes, *(test.source.notes if settings.test else ())):
        say(note)
    device = comm.device()
    backbone = backbone.to(device).to(memory_format=torch.channels_last)
    fit_bn = settings.checkpoint == RANDOM if settings.fit_bn is None else settings.fit_bn
    if fit_bn:
        fit_on(backbone, train, preprocessing, settings.batch_size, settings.workers, settings.seed)
    say(
        f"{settings.checkpoint}: {backbone.num_features} features, {len(train)} training and "
        f"{counted(len(test), 'test image')} of {counted(len(train.classes), 'class')}, "
        f"cropped to {preprocessing.crop_size} of {preprocessing.resize} px"
    )
    cache = ArrayCache(settings.cache) if settings.cache else None
    bank, tests = (
        extract(
            backbone,
            images,
            preprocessing,
            name=name,
            cache=cache,
            batch_size=settings.batch_size,
            threads=settings.workers,
            say=say,
        )
        for name, images in (("train", train), ("test", test))
    )
    result: dict[str, Any] = {
        "checkpoint": settings.checkpoint,
        "weights_sha256": digest(backbone),
        "architecture": architecture(backbone.state_dict()),
        "bn_fitted": fit_bn,
        "train": {"spec": settings.train, "images": len(bank), "skipped": list(bank.skipped)},
        "test": {
            "spec": settings.test or f"{settings.holdout:g} of {settings.train} (held out)",
            "images": len(tests),
            "skipped": list(tests.skipped),
        },
        "classes": list(train.classes),
        "preprocessing": asdict(preprocessing),
        "seed": settings.seed,
        "version": __version__,
    }
    named = weighted_knn(
        bank.values,
        bank.labels,
        tests.values,
        num_classes=len(train.classes),
        k=settings.k,
        temperature=settings.temperature,
        device=device,
    )
    result["knn"] = _measured(named, tests, k=min(settings.k, len(bank)), T=settings.temperature)
    if settings.quick:
        classifier, penalty = quick_linear(bank, device=device, seed=settings.seed, say=say)
        result["quick_linear"] = _measured(
            rank_classes(classifier, tests.values), tests, penalty=penalty
        )
    if settings.linear is not None:
        several = len(settings.linear.rates) > 1
        kept, held = train, None
        if several:
            rows, others = stratified_split(train.labels, HELD_OUT, settings.seed)
            if not len(others):
                raise UserError(
                    "every class has one image, which leaves none to choose among "
                    "several rates: pass one with --lr."
                )
            kept, held = train.pick(rows), train.pick(others)
        heads = train_linear(
            backbone,
            kept,
            settings.linear,
            crop_size=preprocessing.crop_size,
            seed=settings.seed,
            workers=settings.workers,
            say=say,
        )
        result["linear"] = [
            _measured(
                rank_classes(head, tests.values), tests, **asdict(settings.linear) | {"rates": rate}
            )
            for head, rate in zip(heads, settings.linear.rates, strict=True)
        ]
        if held is not None:
            deciding = extract(
                backbone,
                held,
                preprocessing,
                name="held-out",
                batch_size=settings.batch_size,
                threads=settings.workers,
                say=say,
            )
            for head, measured in zip(heads, result["linear"], strict=True):
                named = rank_classes(head, deciding.values)
                found = accuracy(named, deciding.labels, deciding.classes)
                measured["held_out"] = {"images": len(deciding), "top1": found.top1}
    return result


def fit_on(
    backbone: ResNet,
    images: LabelledImages,
    preprocessing: Preprocessing,
    batch_size: int = 256,
    threads: int = 1,
    seed: int = 0,
) -> None:
    """Run `fit_batch_norm` on up to 50 batches of images drawn at random.

    In file order, each batch would contain few classes.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
    batches = read_batches(
        images,
        preprocessing,
        batch_size=batch_size,
        threads=threads,
        rows=order[: 50 * batch_size],
    )
    fit_batch_norm(backbone, (pixels for _, pixels, _ in batches if len(pixels) > 1))


def _open(settings: Settings, cfg: CfgNode | None) -> tuple[ResNet, int]:
    """Return the backbone and the crop size it was trained with."""
    if settings.checkpoint != RANDOM:
        backbone, crop_size = load_backbone(settings.checkpoint)
        return backbone, crop_size or 224
    if cfg is None:
        raise UserError(
            f"{RANDOM} weights need an architecture: pass --config NAME, or --config FILE with the "
            f"config.yaml of the run to compare with."
        )
    backbone = random_backbone(
        settings.seed,
        depth=cfg.MODEL.DEPTH,
        width=cfg.MODEL.WIDTH,
        groups=cfg.MODEL.GROUPS,
        width_per_group=cfg.MODEL.WIDTH_PER_GROUP,
    )
    return backbone, cfg.INPUT.CROP_SIZE


def _measured(named: torch.Tensor, tests: Features, **how: Any) -> dict[str, Any]:
    return {**how, **accuracy(named, tests.labels, tests.classes).as_dict()}


def summary(result: dict[str, Any]) -> str:
    """Format a result: one line per classifier, and a table of the classes."""
    columns = {f"kNN (k {result['knn']['k']}, T {result['knn']['T']:g})": result["knn"]}
    if "quick_linear" in result:
        quick = result["quick_linear"]
        columns[f"linear, quick (penalty {quick['penalty']:g})"] = quick
    for linear in result.get("linear", ()):
        columns[f"linear, {counted(linear['epochs'], 'epoch', 'g')}, lr {linear['rates']:g}"] = (
            linear
        )
    width = max(map(len, columns))
    lines = [f"{name:<{width}}  {_accuracy(m)}" for name, m in columns.items()]
    rates: Sequence[dict[str, Any]] = result.get("linear", ())
    if len(rates) > 1:
        best = max(rates, key=lambda m: m["held_out"]["top1"])  # the lower rate in a tie
        lines.append(
            f"linear: {_accuracy(best)} at the learning rate {best['rates']:g}, the best of "
            f"{len(rates)} on {counted(best['held_out']['images'], 'training image')} that the "
            f"classifiers were not trained on ({best['held_out']['top1']:.2f} %)."
        )
    names = list(result["knn"]["per_class"])
    widest = max(map(len, names))
    heads = ["kNN", *(["quick"] if "quick_linear" in result else [])]
    heads += [f"lr {m['rates']:g}" for m in rates]
    lines += ["", f"{'top-1 of each class':<{max(widest, 19)}}" + "".join(f"{h:>8}" for h in heads)]
    for name in names:
        values = "".join(f"{m['per_class'][name]:8.1f}" for m in columns.values())
        lines.append(f"{name:<{max(widest, 19)}}{values}")
    skipped = [*result["train"]["skipped"], *result["test"]["skipped"]]
    if skipped:
        lines += ["", f"{counted(len(skipped), 'image')} could not be read:", *skipped[:5]]
    return "\n".join(lines)


def _accuracy(measured: dict[str, Any]) -> str:
    return str(Accuracy(measured["top1"], measured["top5"], {}))


def write(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(result, indent=1) + "\n")

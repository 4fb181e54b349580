"""Everything that there is to see of a run, drawn into one folder and said in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_common import comm
from moco_common.errors import UserError
from pretrain.data.source_base import Source
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import build_recipes
from pretrain.engine.health_monitor import patience
from pretrain.inspection.curves import draw_curves, draw_spectra, last_words
from pretrain.inspection.dictionary import dictionary_of, judge_prototypes, prototype_use
from pretrain.inspection.filters import GROWN, GROWTH_MATTERS, draw_filters, growth, measure_filters
from pretrain.inspection.findings import Findings
from pretrain.inspection.geometry import judge, measure
from pretrain.inspection.neighbours import (
    class_names,
    draw_neighbours,
    features_of,
    nearest_neighbours,
    sample_images,
)
from pretrain.inspection.run_directory import InspectedRun, open_run
from pretrain.methods.base import Method
from pretrain.probe.backbone import backbone_of, build_backbone
from pretrain.probe.features import Features, Say
from pretrain.visualization.contact_sheet import png
from pretrain.visualization.views import views_picture

VIEWS = 6  # images in the picture of views


@dataclass(frozen=True)
class Settings:
    """What to look at.

    Attributes:
        run: a run directory, or one of its checkpoints.
        output: folder for everything written; None for ``inspection`` in the run's.
        data: specs of the images; empty for the run's own.
        no_images: leave out what needs images.
        images: how many to look at, drawn at random.
        queries, k: how many of them to show with their nearest k.
        crop_size: pixels; None for that of the run.
        seed: of the draw.
    """

    run: str
    output: Path | None = None
    data: tuple[str, ...] = ()
    no_images: bool = False
    images: int = 1000
    queries: int = 8
    k: int = 8
    crop_size: int | None = None
    workers: int = 1
    seed: int = 0


def inspect_run(settings: Settings, say: Say = print) -> dict[str, Any]:
    """Look at a run and write what is seen: pictures, ``summary.txt``, ``summary.json`` and
    ``index.html``, one page that holds all of it.

    Returns:
        what ``summary.json`` holds, ``text``, what ``summary.txt`` does, and the ``folder``.

    Raises:
        UserError: there is no run, it cannot be read, or its images are not where they were.
    """
    for word, value, least in (
        ("--images", settings.images, 2),
        ("--queries", settings.queries, 1),
        ("-k", settings.k, 1),
    ):
        if value < least:
            raise UserError(f"{word} is {value}: it must be at least {least}.")
    run = open_run(settings.run)
    source = None if settings.no_images else _open_images(run, settings)
    folder = settings.output or run.folder / "inspection"
    folder.mkdir(parents=True, exist_ok=True)
    seen = Findings(folder)
    method = run.build()
    _curves(run, method, seen)
    if run.state is not None:
        _filters(run.state["state_dict"], seen)
        _dictionary(run, seen)
    if source is not None:
        seen.draw(
            "The first images of the run, and the views that the network sees of them",
            "views.png",
            views_picture(
                source,
                build_recipes(run.cfg),
                min(VIEWS, len(source)),
                method=run.cfg.METHOD,
                seed=run.cfg.SEED,
            ),
        )
        if run.state is not None:
            _images(run, method, source, settings, seen, say)
    if seen.geometries:
        seen.draw(
            "Singular values: the longer they stay high, the more directions are in use",
            "spectrum.png",
            draw_spectra(seen.geometries),
        )
    return seen.write(run)


def _open_images(run: InspectedRun, settings: Settings) -> Source:
    if settings.data:
        return open_source(settings.data)
    try:
        return open_source(list(run.cfg.DATA))
    except UserError as error:
        raise UserError(
            f"the run's images are not where they were ({error}): say where they are now with "
            f"--data, or leave them out with --no-images."
        ) from None


def _curves(run: InspectedRun, method: Method, seen: Findings) -> None:
    figure = draw_curves({run.cfg.METHOD: run.records}, chance_loss=method.chance_loss)
    if figure is None:
        return
    seen.draw("Curves, as the run logged them", "curves.png", figure)
    last = run.records[-1]
    seen.numbers["last_record"] = last
    seen.numbers["chance_loss"] = method.chance_loss
    parts = [f"iteration {last['iteration']}"]
    for key, text in (
        ("loss", "loss {:.3f}"),
        ("accuracy", "accuracy {:.1%}"),
        ("spread", "spread {:.2f}"),
        ("lr", "lr {:.4g}"),
        ("images_per_second", "{:.0f} images/s"),
    ):
        if key in last:
            parts.append(text.format(last[key]))
        if key == "loss" and method.chance_loss is not None:
            parts[-1] += f" (chance {method.chance_loss:.3f})"
    known = [record["knn_top1"] for record in run.records if "knn_top1" in record]
    if known:
        parts.append(f"kNN {known[-1]:.1f} % (best {max(known):.1f} %)")
    seen.lines["curves"] = ", ".join(parts)
    wait = patience(method.settling_images, run.cfg.SOLVER.BATCH_SIZE)
    seen.sentences += last_words(run.records, method.chance_loss, wait, method.remedies)


def _filters(state: Mapping[str, Tensor], seen: Findings) -> None:
    banks = {
        name: state[f"{name}.conv1.weight"]
        for name in ("encoder_q", "encoder_k", "target")
        if f"{name}.conv1.weight" in state
    }
    measured = {name: measure_filters(bank) for name, bank in banks.items()}
    for name, filters in measured.items():
        seen.lines[f"filters, {name}"] = filters.line()
    seen.numbers["filters"] = {name: filters.as_dict() for name, filters in measured.items()}
    seen.sentences += measured["encoder_q"].findings()
    name, factor = growth(state)
    seen.lines["weights"] = f"{name} has grown most, to {factor:.2f} times its first norm"
    seen.numbers["largest_growth"] = {"layer": name, "factor": factor}
    if factor > GROWN and name != "conv1.weight":
        seen.sentences.append(
            f"{name} has grown to {factor:.0f} times the norm it started with: {GROWTH_MATTERS}"
        )
    blocks = " above, ".join(banks) + (" below" if len(banks) > 1 else "")
    seen.draw(f"First convolution: {blocks}", "filters.png", png(draw_filters(banks)))


def _dictionary(run: InspectedRun, seen: Findings) -> None:
    found = dictionary_of(run)
    seen.numbers["dictionary"] = found.as_dict() if found else None
    if found is None:
        return
    seen.lines[found.kind] = found.line()
    if found.geometry:
        seen.add_geometry("keys", found.geometry)
    seen.sentences += found.findings()


def _images(
    run: InspectedRun,
    method: Method,
    source: Source,
    settings: Settings,
    seen: Findings,
    say: Say,
) -> None:
    assert run.state is not None
    sample = sample_images(source, settings.images, settings.seed)
    device = comm.device()
    backbone = build_backbone(backbone_of(run.state["state_dict"], "encoder_q.")).to(device)
    features = features_of(
        backbone.to(memory_format=torch.channels_last),
        sample,
        settings.crop_size or run.cfg.INPUT.CROP_SIZE,
        cache=seen.folder / "features",
        threads=settings.workers,
        say=say,
    )
    if len(features) < 2:
        raise UserError(f"{len(features)} image is too few to look at: name more with --data.")
    seen.sentences += [f"left out: {line}" for line in features.skipped]
    _sample_geometry(method, features, seen)
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(settings.seed))
    queries = chosen[: settings.queries].sort().values
    found = nearest_neighbours(features, queries, settings.k)
    names = class_names(sample)
    seen.numbers["neighbours"] = {
        "queries": [sample.name(i) for i in found.queries.tolist()],
        "found": [[sample.name(i) for i in row] for row in found.found.tolist()],
        "cosine": [[round(c, 4) for c in row] for row in found.cosine.tolist()],
    }
    seen.draw(
        f"Queries (left) and what the features take to be like them, of {len(features)} images",
        "neighbours.png",
        draw_neighbours(sample, found, names),
    )
    if names:
        every = nearest_neighbours(features, torch.arange(len(features)), settings.k)
        share, classes = every.same_class(names), [names[i] for i in features.labels.tolist()]
        chance = sum((classes.count(c) / len(classes)) ** 2 for c in set(classes))
        seen.numbers["neighbours"] |= {"same_class": share, "same_class_by_chance": chance}
        seen.lines["neighbours"] = (
            f"{share:.1%} of the nearest {settings.k} of {len(features)} images lie in the same "
            f"class folder ({chance:.1%} by chance)"
        )


@torch.no_grad()
def _sample_geometry(method: Method, features: Features, seen: Findings) -> None:
    """Of the backbone's features and of what the head makes of them."""
    encoder = method.encoder_q
    head = encoder.get_submodule("fc").cpu()
    projections = torch.cat([head(part.float()) for part in features.values.split(4096)])
    seen.add_geometry("features", measure(features.values))
    seen.add_geometry("projections", measure(projections))
    state, sentence = judge(seen.geometries["projections"], "projections")
    if seen.numbers["dictionary"] is None:  # the keys have spoken already, if there are any
        seen.sentences.append(sentence)
    prototypes = method.state_dict().get("prototypes.weight")
    if prototypes is not None:
        use = prototype_use(projections, prototypes)
        seen.numbers["prototypes"] = use
        if state != "collapsed":  # else the nearest is so by the last digits
            seen.sentences.append(judge_prototypes(use, len(features)))

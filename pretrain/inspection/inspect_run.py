"""Inspection of a run: pictures and figures in one folder, and a summary of a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_common import comm
from moco_common.backbone.resnet import growth_warning
from moco_common.errors import UserError
from moco_common.files import make_folder, protecting
from moco_common.text import counted
from pretrain.data.loader import build_batches
from pretrain.data.source_base import Source
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import build_recipes
from pretrain.engine.health_monitor import patience
from pretrain.inspection.cells import draw_matches, draw_slots, match_views
from pretrain.inspection.curves import draw_curves, draw_spectra, last_words
from pretrain.inspection.dictionary import dictionary_of, judge_prototypes, prototype_use
from pretrain.inspection.filters import GROWTH_REMEDY, draw_filters, growth, measure_filters
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
from pretrain.modeling.resnet import ResNet
from pretrain.probe.backbone import backbone_of, build_backbone
from pretrain.probe.features import Features, Say
from pretrain.visualization.contact_sheet import png
from pretrain.visualization.views import views_picture

VIEWS = 6  # images in the contact sheet of views


@dataclass(frozen=True)
class Settings:
    """Options of an inspection.

    Attributes:
        run: a run directory, or one of its checkpoints.
        output: folder of the results; None for ``inspection`` in the run directory.
        data: specs of the images; empty for the run's own.
        no_images: skip what needs images.
        images: number of images, sampled at random.
        queries, k: number of images that are shown, each with its nearest k.
        crop_size: crop size in pixels; None for that of the run.
        workers: threads that decode images.
        seed: seed of the sample.
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
    """Inspect a run and write pictures, ``summary.txt``, ``summary.json`` and ``index.html``, which
    shows everything.

    Returns:
        the content of ``summary.json``, with that of ``summary.txt`` as ``text``, and ``folder``.

    Raises:
        UserError: there is no run, it cannot be read, or its images have moved.
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
    _make_folder(folder, unasked=settings.output is None)
    with protecting(source.files_in(folder) if source is not None else ()):
        return _inspect(run, source, settings, Findings(folder), say)


def _inspect(
    run: InspectedRun, source: Source | None, settings: Settings, seen: Findings, say: Say
) -> dict[str, Any]:
    method = run.build()
    _curves(run, method, seen)
    if run.state is not None:
        _filters(method, run.state["state_dict"], seen)
        _dictionary(run, method, seen)
    if source is not None:
        seen.draw(
            "The first images of the run, each with the views that the network is given",
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
            _cells(run, method, source, seen)
            _images(run, method, source, settings, seen, say)
    if seen.geometries:
        seen.draw(
            "Singular values: the more slowly they decrease, the more directions are in use",
            "spectrum.png",
            draw_spectra(seen.geometries),
        )
    return seen.write(run)


def _make_folder(folder: Path, unasked: bool) -> None:
    if unasked and (folder.is_symlink() or (folder / "features").is_symlink()):
        raise UserError(f"{folder} leads elsewhere, by a link: choose the output folder with -o.")
    make_folder(folder, "-o")


def _open_images(run: InspectedRun, settings: Settings) -> Source:
    if settings.data:
        return open_source(settings.data)
    specs = run.image_specs()
    try:
        return open_source(specs)
    except UserError as error:
        raise UserError(
            f"the run's images have moved ({error}): give their new location with --data, or skip "
            f"them with --no-images."
        ) from None


def _curves(run: InspectedRun, method: Method, seen: Findings) -> None:
    figure = draw_curves({run.cfg.METHOD: run.records}, chance_loss=method.chance_loss)
    if figure is None:
        return
    seen.draw("Training curves", "curves.png", figure)
    last = run.records[-1]
    seen.numbers["last_record"] = last
    seen.numbers["chance_loss"] = method.chance_loss
    parts = [f"iteration {last['iteration']}"]
    for key, text in (
        ("loss", "loss {:.3f}"),
        ("accuracy", "accuracy {:.1%}"),
        ("spread", "spread {:.2f}"),
        ("rank_me", "RankMe {:.1f}"),
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


def _filters(method: Method, state: Mapping[str, Tensor], seen: Findings) -> None:
    encoders = [name for name, module in method.named_modules() if isinstance(module, ResNet)]
    banks = {name: state[f"{name}.conv1.weight"] for name in encoders}
    measured = {name: measure_filters(bank) for name, bank in banks.items()}
    for name, filters in measured.items():
        seen.lines[f"filters, {name}"] = filters.line()
    seen.numbers["filters"] = {name: filters.as_dict() for name, filters in measured.items()}
    seen.sentences += measured["encoder_q"].findings()
    name, factor = growth(state)
    seen.lines["weights"] = f"{name} has grown the most, to {factor:.2f} times its initial norm"
    seen.numbers["largest_growth"] = {"layer": name, "factor": factor}
    grown = growth_warning(name, factor, GROWTH_REMEDY)
    if grown and name != "conv1.weight":  # that one is in the findings on filters
        seen.sentences.append(grown)
    blocks = " above, ".join(banks) + (" below" if len(banks) > 1 else "")
    seen.draw(f"First convolution: {blocks}", "filters.png", png(draw_filters(banks)))


def _dictionary(run: InspectedRun, method: Method, seen: Findings) -> None:
    found = dictionary_of(method, run.step, run.cfg.SOLVER.BATCH_SIZE)
    seen.numbers["dictionary"] = found.as_dict() if found else None
    if found is None:
        return
    seen.lines[found.memory.kind] = found.line()
    if found.geometry:
        seen.add_geometry("keys", found.geometry)
    seen.sentences += found.findings()


@torch.no_grad()
def _cells(run: InspectedRun, method: Method, source: Source, seen: Findings) -> None:
    """Matched cells and slots of the images whose views are shown, if the method has any."""
    recipes = build_recipes(run.cfg)[: method.num_views]
    n, seed = min(VIEWS, len(source)), run.cfg.SEED
    (batch,) = build_batches(
        source, recipes, batch_size=n, seed=seed, stop_step=1, max_bad_share=1.0
    )
    views = batch.to("cpu")
    matches, slots = match_views(method, batch), method.slots(views[0])
    if matches is not None:
        seen.lines["correspondences"] = matches.line()
        seen.numbers["correspondences"] = matches.as_dict()
        seen.draw(
            "The most similar cells of two views: green if they show the same place",
            "correspondences.png",
            png(draw_matches(views, matches)),
        )
    if slots is not None:
        seen.draw("Slots: cells of one colour", "slots.png", png(draw_slots(views[0], slots)))


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
        raise UserError(
            f"Only {counted(len(features), 'image')} can be read, which is too few: give a larger "
            f"set with --data."
        )
    seen.sentences += [f"skipped: {line}" for line in features.skipped]
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
        f"Queries (left) and their nearest neighbours among {len(features)} images",
        "neighbours.png",
        draw_neighbours(sample, found, names),
    )
    if names:
        every = nearest_neighbours(features, torch.arange(len(features)), settings.k)
        share, classes = every.same_class(names), [names[i] for i in features.labels.tolist()]
        chance = sum((classes.count(c) / len(classes)) ** 2 for c in set(classes))
        seen.numbers["neighbours"] |= {"same_class": share, "same_class_by_chance": chance}
        seen.lines["neighbours"] = (
            f"{share:.1%} of the nearest {settings.k} of {len(features)} images are in the same "
            f"class folder ({chance:.1%} by chance)"
        )


@torch.no_grad()
def _sample_geometry(method: Method, features: Features, seen: Findings) -> None:
    """Measure the backbone's features and the head's projections of them."""
    parts = features.values.split(4096)
    projections = torch.cat([method.project(part.float()) for part in parts])
    seen.add_geometry("features", measure(features.values))
    seen.add_geometry("projections", measure(projections))
    state, sentence = judge(seen.geometries["projections"], "projections")
    if seen.numbers["dictionary"] is None:  # otherwise the keys have been judged already
        seen.sentences.append(sentence)
    centres = method.cluster_centres()
    if centres is not None:
        use = prototype_use(projections, centres)
        seen.numbers["prototypes"] = use
        if state != "collapsed":  # otherwise rounding decides which prototype is nearest
            remedy = method.remedies["collapse"]
            seen.sentences.append(judge_prototypes(use, len(features), remedy))

"""The pictures of a report: curves, and detections of each group beside the ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moco_common.errors import UserError
from moco_det.report.curves import TITLES, precision_recall_curves, training_curves
from moco_det.report.error_analysis import analyse_run, choose_images
from moco_det.report.example_images import classes_of_runs, draw_images
from moco_det.report.predictions_io import OpenDataset, has_predictions, open_dataset
from moco_det.report.runs import Run
from moco_det.report.tables import Table

MOST_GROUPS = 4  # beside each other in one picture
CAPTIONS = {
    "best": "Where the groups do best",
    "worst": "Where they do worst",
    "most different": "Where they differ most",
}


def analyse_tables(tables: Sequence[Table], folder: str | Path, num_images: int = 4) -> list[str]:
    """Analyse the predictions that the runs kept, and draw what they show into ``folder``.

    Groups whose runs kept no predictions are left out. Fills the tables' ``analyses``, ``images``
    and ``figures``.

    Args:
        num_images: how many of each kind to draw; 0 for no pictures of detections.

    Returns:
        A sentence for each table that could not be analysed, such as one of data that are gone.
    """
    notes = []
    for number, table in enumerate(tables):
        runs = {g.label: [r for r in g.runs if has_predictions(r.path)] for g in table.groups}
        runs = {label: kept for label, kept in runs.items() if kept}
        if not runs:
            continue
        try:
            every = [run.path for kept in runs.values() for run in kept]
            dataset = open_dataset(table.dataset, classes_of_runs(every))
            _analyse(table, dataset, runs, Path(folder), str(number), num_images)
        except (UserError, OSError) as error:
            notes.append(f"no analysis of {table.dataset}: {error}")
    return notes


def training_figure(
    runs: Sequence[Run], tables: Sequence[Table], folder: str | Path
) -> dict[str, Path]:
    """Caption -> picture of the training curves; nothing where no run logged any."""
    if not any(len(run.series(key)[0]) > 1 for run in runs for key in TITLES):
        return {}
    labels = {run.path: run.label for run in runs}
    labels |= {run.path: g.label for t in tables for g in t.groups for run in g.runs}
    curves: dict[str, list[Run]] = {}
    for run in runs:
        curves.setdefault(labels[run.path], []).append(run)
    return {"Training curves": training_curves(curves, Path(folder) / "curves.png")}


def _analyse(
    table: Table,
    dataset: OpenDataset,
    runs: Mapping[str, Sequence[Run]],
    folder: Path,
    suffix: str,
    num_images: int,
) -> None:
    analyses = {
        label: [analyse_run(run.path, dataset) for run in kept] for label, kept in runs.items()
    }
    table.class_names, table.analyses = dataset.class_names, analyses
    curves = {label: [run.precision for run in found] for label, found in analyses.items()}
    path = folder / f"precision-recall-{suffix}.png"
    if precision_recall_curves(curves, dataset.class_names, path) is not None:
        table.figures["Precision over recall"] = path
    shown = list(runs)[:MOST_GROUPS]
    first = {label: analyses[label][0] for label in shown}
    if num_images <= 0:
        return
    chosen = choose_images([run.f1 for run in first.values()], num_images)
    for kind, indices in chosen.items():
        records = [dataset.records[index] for index in indices]
        f1 = {label: run.f1[indices] for label, run in first.items()}
        table.images[kind] = [
            {"file_name": r["file_name"], "f1": {k: round(float(v[i]), 4) for k, v in f1.items()}}
            for i, r in enumerate(records)
        ]
        if not records:
            continue
        notes = [
            "F1 " + " / ".join(f"{values[i]:.2f}" for values in f1.values())
            for i in range(len(records))
        ]
        path = folder / f"{kind.replace(' ', '-')}-{suffix}.jpg"
        paths = {label: runs[label][0].path for label in shown}
        thresholds = {label: run.threshold for label, run in first.items()}
        draw_images(dataset, records, paths, thresholds, path, notes)
        table.figures[
            f"{CAPTIONS[kind]} (by F1 of the image, at its left in the order of the columns; first "
            "run of each group, at the score that gives its best F1 over the data set)"
        ] = path

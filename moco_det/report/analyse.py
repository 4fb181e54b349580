"""Analysis of the kept predictions of groups of runs: errors, curves, and example images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moco_common.files import protecting
from moco_det.report.curves import precision_recall_curves
from moco_det.report.error_analysis import RunAnalysis, analyse_run, choose_images
from moco_det.report.example_images import any_masks, classes_of_runs, draw_images
from moco_det.report.groups import Group
from moco_det.report.predictions_io import OpenDataset, has_predictions, open_dataset
from moco_det.report.runs import Run

MOST_GROUPS = 4  # side by side in one picture
CAPTIONS = {
    "best": "Highest F1",
    "worst": "Lowest F1",
    "most different": "Largest difference in F1",
}


@dataclass(frozen=True)
class Analysis:
    """The analysis of the groups of one table.

    Attributes:
        class_names: C names, in the order of the matrices and curves.
        runs: group label -> the analysis of each of its runs.
        images: kind ("best", "worst", "most different") -> file name and F1 of each image.
        figures: caption -> picture.
    """

    class_names: Sequence[str]
    runs: Mapping[str, Sequence[RunAnalysis]]
    images: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    figures: Mapping[str, Path] = field(default_factory=dict)

    def confusion(self, label: str) -> np.ndarray:
        """(C + 1, C + 1): the sum over the runs of a group."""
        total: np.ndarray = np.sum([run.confusion for run in self.runs[label]], axis=0)
        return total

    def as_dict(self) -> dict[str, Any]:
        """The analysis as plain values, without NaN."""
        groups = {}
        for label, runs in self.runs.items():
            curves = np.mean([run.precision for run in runs], axis=0)  # 2 x R x C
            groups[label] = {
                "thresholds": [run.threshold for run in runs],
                "sizes": [{k: _finite(v) for k, v in run.sizes.items()} for run in runs],
                "confusion": self.confusion(label).tolist(),
                "precision_at_iou_50": {
                    name: [_finite(round(value, 4)) for value in curves[0, :, index].tolist()]
                    for index, name in enumerate(self.class_names)
                },
            }
        return {
            "classes": list(self.class_names),
            "recall": [round(value, 2) for value in np.linspace(0, 1, 101).tolist()],
            "groups": groups,
            "images": self.images,
        }


def analyse_groups(
    groups: Sequence[Group], folder: Path | None, suffix: str, num_images: int
) -> Analysis | None:
    """Analyse the predictions that runs on one data set kept.

    Groups whose runs kept no predictions are left out.

    Args:
        folder: where pictures are written; None for no pictures.
        suffix: what distinguishes the names of these pictures from those of other tables.
        num_images: number of images of each kind to draw.

    Returns:
        The analysis, or None if no run kept its predictions.

    Raises:
        UserError: the data set cannot be read, or the predictions belong to other data.
    """
    runs = {g.label: [r for r in g.runs if has_predictions(r.path)] for g in groups}
    runs = {label: kept for label, kept in runs.items() if kept}
    if not runs:
        return None
    paths = [run.path for kept in runs.values() for run in kept]
    dataset = open_dataset(groups[0].table[1], classes_of_runs(paths), masks=any_masks(paths))
    analyses = {
        label: [analyse_run(run.path, dataset) for run in kept] for label, kept in runs.items()
    }
    if folder is None:
        return Analysis(dataset.class_names, analyses)
    with protecting(record["file_name"] for record in dataset.records):
        return _illustrated(dataset, runs, analyses, folder, suffix, num_images)


def _illustrated(
    dataset: OpenDataset,
    runs: Mapping[str, Sequence[Run]],
    analyses: Mapping[str, Sequence[RunAnalysis]],
    folder: Path,
    suffix: str,
    num_images: int,
) -> Analysis:
    """Draw the curves, and the best, worst and most different images of the first runs."""
    figures: dict[str, Path] = {}
    curves = {label: [run.precision for run in found] for label, found in analyses.items()}
    path = folder / f"precision-recall-{suffix}.png"
    if precision_recall_curves(curves, dataset.class_names, path) is not None:
        figures["Precision over recall"] = path
    images: dict[str, list[dict[str, Any]]] = {}
    first = {label: analyses[label][0] for label in list(runs)[:MOST_GROUPS]}
    paths = {label: runs[label][0].path for label in first}
    thresholds = {label: run.threshold for label, run in first.items()}
    kinds = choose_images([run.f1 for run in first.values()], num_images) if num_images > 0 else {}
    for kind, indices in kinds.items():
        records = [dataset.records[index] for index in indices]
        f1 = [{label: round(float(run.f1[i]), 4) for label, run in first.items()} for i in indices]
        images[kind] = [
            {"file_name": record["file_name"], "f1": scores}
            for record, scores in zip(records, f1, strict=True)
        ]
        if not records:
            continue
        notes = ["F1 " + " / ".join(f"{s:.2f}" for s in scores.values()) for scores in f1]
        path = folder / f"{kind.replace(' ', '-')}-{suffix}.jpg"
        caption = (
            f"{CAPTIONS[kind]} (stated at the left, in the order of the columns). Detections of "
            "the first run of each group, above the score of its best F1 over the data set."
        )
        figures[caption] = draw_images(dataset, records, paths, thresholds, path, notes)
    return Analysis(dataset.class_names, analyses, images, figures)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None

"""What a report tells beyond its main tables: by class, by size, confusions, deviations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moco_common.text import counted
from moco_det.report.error_analysis import RunAnalysis
from moco_det.report.groups import Group
from moco_det.report.significance import summarize
from moco_det.report.tables import Table, spread

SIZES = {
    f"{task}/AP{size}": f"{name} AP{size}"
    for task, name in (("bbox", "box"), ("segm", "mask"), ("keypoints", "keypoint"))
    for size in "sml"
}
FREQUENCIES = {
    f"{task}/AP{kind}": f"{name} AP{kind}"
    for task, name in (("bbox", "box"), ("segm", "mask"))
    for kind in "rcf"
}
BY_CLASS = {
    "bbox": "Box AP by class",
    "segm": "Mask AP by class",
    "keypoints": "Keypoint AP by class",
    "sem_seg": "IoU by class",
}
MOST_CLASSES_IN_MATRIX = 20
MOST_CONFUSIONS = 15
Rows = list[list[str]]


@dataclass(frozen=True)
class Detail:
    """A further table. `shades` holds a strength in [0, 1] for each cell behind the first."""

    title: str
    head: list[str]
    rows: Rows
    note: str = ""
    shades: list[list[float]] | None = None


def details(table: Table) -> list[Detail]:
    """Everything there is about a table's groups beside the means."""
    found = []
    head, rows = table.rows(SIZES)
    if len(head) > 2:
        found.append(Detail("By object size", head, rows))
    elif table.analyses:
        found.append(_sizes(table))
    head, rows = table.rows(FREQUENCIES)
    if len(head) > 2:
        found.append(Detail("By frequency of the class (rare, common, frequent)", head, rows))
    for task, title in BY_CLASS.items():
        head, rows = class_rows(table, task)
        if rows:
            found.append(Detail(title, head, rows))
    found += [_confusions(table, *item) for item in table.analyses.items()]
    return found


def class_rows(table: Table, task: str = "bbox") -> tuple[list[str], Rows]:
    """Score by class of one task: one row a class, one column a group."""
    per_run = {g.label: [run.per_class(task) for run in g.runs] for g in table.groups}
    names = dict.fromkeys(n for runs in per_run.values() for scores in runs for n in scores)
    rows = []
    for name in names:
        samples = ([s[name] for s in runs if name in s] for runs in per_run.values())
        rows.append([name, *(spread(summarize(v)) if v else "-" for v in samples)])
    return ["class", *per_run], rows


def deviations(table: Table) -> list[tuple[str, list[str]]]:
    """(heading, lines) of how the groups deviate from their protocol, and what that does.

    What all groups share is said once.
    """
    blocks: list[tuple[str, list[str]]] = []
    questions: tuple[tuple[str, Callable[[Group], Any]], ...] = (
        (f"Deviations from {table.protocol}", lambda g: g.deviations),
        ("What was run, and what that does", lambda g: g.results.get("explanation")),
    )
    for what, of in questions:
        by_text: dict[tuple[str, ...], list[str]] = {}
        for group in table.groups:
            lines = of(group)
            if isinstance(lines, list) and lines:
                by_text.setdefault(tuple(map(str, lines)), []).append(group.label)
        for lines, labels in by_text.items():
            whose = "all groups" if len(labels) == len(table.groups) else ", ".join(labels)
            blocks.append((f"{what}: {whose} ({len(lines)})", list(lines)))
    return blocks


def confusion(runs: Sequence[RunAnalysis]) -> np.ndarray:
    """(C + 1, C + 1): the sum over the runs of a group."""
    total: np.ndarray = np.sum([run.confusion for run in runs], axis=0)
    return total


def analysis_dict(table: Table) -> dict[str, Any] | None:
    """The analysis as plain values; None where there is none."""
    if not table.analyses:
        return None
    groups = {}
    for label, runs in table.analyses.items():
        curves = np.mean([run.precision for run in runs], axis=0)  # 2 x R x C
        groups[label] = {
            "thresholds": [run.threshold for run in runs],
            "sizes": [{k: _finite(v) for k, v in run.sizes.items()} for run in runs],
            "confusion": confusion(runs).tolist(),
            "precision_at_iou_50": {
                name: [_finite(round(value, 4)) for value in curves[0, :, index].tolist()]
                for index, name in enumerate(table.class_names)
            },
        }
    return {
        "classes": list(table.class_names),
        "recall": [round(value, 2) for value in np.linspace(0, 1, 101).tolist()],
        "groups": groups,
        "images": table.images,
    }


def _sizes(table: Table) -> Detail:
    rows = []
    for label, runs in table.analyses.items():
        cells = []
        for size in runs[0].sizes:
            values = [run.sizes[size] for run in runs if np.isfinite(run.sizes[size])]
            cells.append(spread(summarize(values)) if values else "-")
        rows.append([label, str(len(runs)), *cells])
    head = ["group", "n", "box APs", "box APm", "box APl"]
    note = "By COCO's metric: objects below 32 x 32 pixels, below 96 x 96, and larger."
    return Detail("By object size", head, rows, note)


def _confusions(table: Table, label: str, runs: Sequence[RunAnalysis]) -> Detail:
    counts, names = confusion(runs), list(table.class_names)
    title = f"Confusion of classes: {label}"
    note = (
        f"Boxes at IoU 0.5 and each run's own best score, summed over {counted(len(runs), 'run')}; "
        "rows are what is there, columns what was found."
    )
    if len(names) <= MOST_CLASSES_IN_MATRIX:
        rows = [
            [name, *map(str, row)]
            for name, row in zip([*names, "(nothing there)"], counts.tolist(), strict=True)
        ]
        rows[-1][-1] = ""
        shades = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        return Detail(title, ["annotated", *names, "(missed)"], rows, note, shades.tolist())
    between = counts[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    first = np.argsort(-between, axis=None, kind="stable")[:MOST_CONFUSIONS]
    rows = []
    for true, wrong in zip(*np.unravel_index(first, between.shape), strict=True):
        count, total = between[true, wrong], counts[true].sum()
        if count:
            rows.append([names[true], names[wrong], str(count), f"{100 * count / total:.1f} %"])
    return Detail(title, ["annotated", "found", "objects", "of the class"], rows, note)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None

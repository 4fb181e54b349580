"""The sections below a table: differences, provenance, breakdowns, confusions, deviations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moco_common.text import counted
from moco_det.report.analyse import Analysis
from moco_det.report.groups import Group
from moco_det.report.significance import Difference, summarize
from moco_det.report.tables import COLUMNS, Table, distinct, spread

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
    """A further table. `shades` has a value in [0, 1] for each cell except the first of a row."""

    title: str
    head: list[str]
    rows: Rows
    note: str = ""
    shades: list[list[float]] | None = None


def details(table: Table) -> list[Detail]:
    """All breakdowns of a table that its runs allow."""
    found = []
    head, rows = table.rows(SIZES)
    if len(head) > 2:
        found.append(Detail("By object size", head, rows))
    elif table.analysis:
        found.append(_sizes(table.analysis))
    head, rows = table.rows(FREQUENCIES)
    if len(head) > 2:
        found.append(Detail("By frequency of the class (rare, common, frequent)", head, rows))
    for task, title in BY_CLASS.items():
        head, rows = class_rows(table, task)
        if rows:
            found.append(Detail(title, head, rows))
    if table.analysis:
        found += [_confusions(table.analysis, label) for label in table.analysis.runs]
    return found


def comparison_lines(table: Table) -> list[str]:
    """One sentence per pair of groups."""
    lines = []
    for pair in table.comparisons:
        parts = [f"{COLUMNS[m]} {_signed(d)}" for m, d in pair.metrics.items() if m in COLUMNS]
        line = f"{pair.a} minus {pair.b}: {', '.join(parts)}"
        reasons = {d.why_no_interval for d in pair.metrics.values()}
        if "n = 1" in reasons:
            line += "; no interval, because a single run (n = 1) has no spread"
        elif "no spread" in reasons:
            line += "; no interval where all runs have the same value"
        if pair.caveats:
            more = f" and {len(pair.caveats) - 5} more" if len(pair.caveats) > 5 else ""
            line += f". They also differ in {', '.join(pair.caveats[:5])}{more}"
        lines.append(line + ".")
    return lines


def provenance_lines(table: Table) -> list[str]:
    """One sentence per group: weights, seeds, iterations, commit, deviations."""
    lines = []
    for group in table.groups:
        facts = [f"weights {' and '.join(distinct(r.weights or 'random' for r in group.runs))}"]
        seeds = ["unknown" if run.seed is None else str(run.seed) for run in group.runs]
        facts.append(f"seed {', '.join(seeds)}")
        for key in ("iteration", "commit", "hardware"):
            values = distinct((run.results or {}).get(key) for run in group.runs)
            values = [value[:10] for value in values] if key == "commit" else values
            facts += [f"{key} {' and '.join(values)}"] if values else []
        if not table.protocol:
            facts.append("follows no protocol")
        elif group.deviations is None:
            facts.append("deviations not recorded")
        elif group.deviations:
            facts.append(
                f"deviates from {table.protocol} in {counted(len(group.deviations), 'key')}"
            )
        else:
            facts.append(f"exactly {table.protocol}")
        lines.append(f"{group.label}: {'; '.join(facts)}.")
    return lines


def class_rows(table: Table, task: str = "bbox") -> tuple[list[str], Rows]:
    """Scores by class for one task: a row per class, a column per group."""
    per_run = {g.label: [run.per_class(task) for run in g.runs] for g in table.groups}
    names = dict.fromkeys(n for runs in per_run.values() for scores in runs for n in scores)
    rows = []
    for name in names:
        samples = ([s[name] for s in runs if name in s] for runs in per_run.values())
        rows.append([name, *(spread(summarize(v)) if v else "-" for v in samples)])
    return ["class", *per_run], rows


def deviations(table: Table) -> list[tuple[str, list[str]]]:
    """(heading, lines): deviations from the protocol, and their effects.

    Groups with the same lines share a heading.
    """
    blocks: list[tuple[str, list[str]]] = []
    questions: tuple[tuple[str, Callable[[Group], Any]], ...] = (
        (f"Deviations from {table.protocol}", lambda g: g.deviations),
        ("Effects of the configuration", lambda g: g.results.get("explanation")),
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


def _signed(difference: Difference) -> str:
    text = f"{difference.mean:+.1f}"
    if difference.interval:
        text += f" [{difference.interval[0]:+.1f}, {difference.interval[1]:+.1f}]"
    return text


def _sizes(analysis: Analysis) -> Detail:
    rows = []
    for label, runs in analysis.runs.items():
        cells = []
        for size in runs[0].sizes:
            values = [run.sizes[size] for run in runs if np.isfinite(run.sizes[size])]
            cells.append(spread(summarize(values)) if values else "-")
        rows.append([label, str(len(runs)), *cells])
    head = ["group", "n", "box APs", "box APm", "box APl"]
    note = "COCO's metric: objects smaller than 32 x 32 pixels, smaller than 96 x 96, and larger."
    return Detail("By object size", head, rows, note)


def _confusions(analysis: Analysis, label: str) -> Detail:
    counts, names = analysis.confusion(label), list(analysis.class_names)
    number = counted(len(analysis.runs[label]), "run")
    title = f"Confusion of classes: {label}"
    note = (
        f"Boxes at IoU 0.5, above each run's score of best F1, summed over {number}; rows are "
        "annotated classes, columns detected ones."
    )
    if len(names) <= MOST_CLASSES_IN_MATRIX:
        rows = [
            [name, *map(str, row)]
            for name, row in zip([*names, "(background)"], counts.tolist(), strict=True)
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

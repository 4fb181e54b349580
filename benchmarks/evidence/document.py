"""The page docs/evidence.md: tables, plots and sentences generated from the results.

Text written by hand between the two marks of a section is kept, see `REMARKS`.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from benchmarks.evidence.terms import METRICS, RANDOM, Expectation, Figure
from moco_common.figures import frame, save_figure
from moco_common.files import replace_text
from moco_det.report.significance import summarize, welch_difference

REMARKS = (
    "<!-- remarks: {name} (written by hand, kept when the page is generated) -->",
    "<!-- end of remarks -->",
)
LOWER_IS_BETTER = {"rss", "loss"}
INTRODUCTION = """# Evidence

The papers' comparisons at a size that two cores can run: what they show there, and what they cannot
show. `benchmarks/evidence/run.py` generates this page, its plots and all sentences outside the
remarks from the results. Numbers are the mean ± sample standard deviation over seeds (of weights,
order, views and permutations). A difference is called significant only if Welch's 95 % confidence
interval excludes zero. With a few seeds, only large differences are, and one in twenty comparisons
of equal cells is expected to be so by chance.
"""


@dataclass(frozen=True)
class Measured:
    """A figure with its results: for each label, one dictionary per finished seed."""

    figure: Figure
    results: Mapping[str, Sequence[Mapping[str, float]]]

    def values(self, label: str, metric: str) -> list[float]:
        """Return the metric's values over the seeds that have it."""
        return [r[metric] for r in self.results.get(label, ()) if r.get(metric) is not None]

    def means(self, labels: Sequence[str], metric: str) -> list[float]:
        """Return the mean over several cells, for each seed that has the metric of all of them."""
        found = [
            {
                r.get("seed", i): r[metric]
                for i, r in enumerate(self.results.get(label, ()))
                if r.get(metric) is not None
            }
            for label in labels
        ]
        seeds = sorted(set.intersection(*map(set, found)))
        return [sum(of[seed] for of in found) / len(found) for seed in seeds]

    def labels(self, metric: str) -> list[str]:
        """Return the labels of the cells that have the metric, in the figure's order."""
        return [c.label for c in self.figure.cells if self.values(c.label, metric)]


def write_document(measured: Sequence[Measured], path: Path, facts: Mapping[str, str]) -> None:
    """Write the page, and its plots to a folder of the same name beside it.

    Args:
        measured: the sections in order; sections without results are omitted.
        facts: facts about the runs, for the table at the top.
    """
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = [f"| {name} | {value} |" for name, value in {**facts, **_machine()}.items()]
    parts = [INTRODUCTION, "\n".join(["| | |", "|---|---|", *rows]), _remarks("all", old)]
    for part in measured:
        if any(part.results.values()):
            picture = path.with_suffix("") / f"{part.figure.name}.png"
            save_figure(plot(part), picture)
            parts.append(_section(part, f"{path.stem}/{picture.name}", old))
    replace_text(path, "\n\n".join(part.strip() for part in parts) + "\n")


def _section(part: Measured, picture: str, old: str) -> str:
    figure = part.figure
    blocks = [f"## {figure.title}", figure.about, f"![{figure.title}]({picture})", table(part)]
    if figure.best:
        blocks.append(best_sentence(part, figure.metrics[0]))
    if figure.expectations:
        blocks.append(expectation_table(part))
    return "\n\n".join([*blocks, _remarks(figure.name, old)])


def table(part: Measured) -> str:
    """Format the results: one row per cell, one column per measured metric."""
    metrics = [m for m in part.figure.metrics if part.labels(m)]
    lines = ["| | n | " + " | ".join(METRICS[m] for m in metrics) + " |"]
    lines.append("|---" * (2 + len(metrics)) + "|")
    for cell in part.figure.cells:
        results = part.results.get(cell.label, ())
        if results:
            columns = [number(part.values(cell.label, m), m) for m in metrics]
            lines.append(f"| {cell.label} | {len(results)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def number(values: Sequence[float], metric: str = "knn") -> str:
    """Format values as mean ± standard deviation; empty if there are none."""
    if not values:
        return ""
    digits = {"rss": 0, "loss": 3, "spread": 2}.get(metric, 1)
    summary = summarize(values)
    if summary.std is None:
        return f"{summary.mean:.{digits}f}"
    return f"{summary.mean:.{digits}f} ± {summary.std:.{digits}f}"


def verdict(a: Sequence[float], b: Sequence[float]) -> tuple[str, str]:
    """Compare a with b.

    Returns:
        "yes" (a is above b), "no, the opposite", "not significant" or "no interval (reason)"; and
        the difference with its interval.
    """
    difference = welch_difference(a, b)
    if difference.interval is None:
        equal = difference.why_no_interval == "no spread" and difference.mean == 0
        word = "not significant" if equal else f"no interval ({difference.why_no_interval})"
        return word, f"{difference.mean:+.1f}"
    low, high = difference.interval
    word = "yes" if low > 0 else "no, the opposite" if high < 0 else "not significant"
    return word, f"{difference.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def best_sentence(part: Measured, metric: str) -> str:
    """Name the cell with the highest mean of each series, and the cells it significantly beats."""
    sentences = []
    series = dict.fromkeys(c.series for c in part.figure.cells)
    for name in series:
        labels = [
            c.label
            for c in part.figure.cells
            if c.series == name and part.values(c.label, metric) and c.label != RANDOM
        ]
        if len(labels) < 2:
            continue
        values = {label: part.values(label, metric) for label in labels}
        best = max(labels, key=lambda label: summarize(values[label]).mean)
        words = {
            label: verdict(values[best], values[label])[0] for label in labels if label != best
        }
        beaten = [label for label, word in words.items() if word == "yes"]
        level = [label for label in words if label not in beaten]
        text = f"The highest mean{f' of {name}' if name else ''} is that of {best} "
        text += f"({number(values[best], metric)})"
        text += f"; it is significantly above {_list(beaten)}" if beaten else ""
        text += f"; it is not significantly above {_list(level)}" if level else ""
        sentences.append(text + ".")
    return " ".join(sentences)


def expectation_table(part: Measured) -> str:
    """Format the papers' expectations, and whether they are observed here."""
    lines = [
        "| expected | metric | difference [95 % interval] | observed |",
        "|---|---|---|---|",
    ]
    for e in part.figure.expectations:
        a, b = (part.means(side, e.metric) for side in e.sides)
        if a and b:
            word, difference = verdict(a, b)
            lines.append(f"| {_claim(e)} | {METRICS[e.metric]} | {difference} | {word} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _claim(e: Expectation) -> str:
    better, worse = (
        side[0] if len(side) == 1 else f"the mean of {_list(side)}" for side in e.sides
    )
    return f"{e.text}: {better} above {worse}"


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{'; '.join(words[:-1])} and {words[-1]}"


def _remarks(name: str, old: str) -> str:
    """Return the marks with the text between them in the old document."""
    start, end = REMARKS[0].format(name=name), REMARKS[1]
    found = re.search(re.escape(start) + "(.*?)" + re.escape(end), old, re.DOTALL)
    return f"{start}{found[1] if found else chr(10)}{end}"


def plot(part: Measured) -> Canvas:
    """Plot a curve over the run, or one panel per metric: lines if cells have an x, else points."""
    if part.figure.curve:
        return _plot_curves(part)
    metrics = [m for m in part.figure.metrics if part.labels(m)][:3]
    lines = any(cell.x is not None for cell in part.figure.cells)
    size = (3.7 * len(metrics) + (1.5 if lines else 2.0), 3.0)
    canvas = Canvas(figsize=size, dpi=80, layout="constrained")
    axes = canvas.subplots(1, len(metrics), squeeze=False)[0]
    draw: Callable[[Axes, Measured, str], None] = _draw_lines if lines else _draw_rows
    for axis, metric in zip(axes, metrics, strict=True):
        draw(axis, part, metric)
        _frame(axis, metric)
        if axis is not axes[0] and not lines:
            axis.set_yticklabels([])
    if lines:
        canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return canvas


def _plot_curves(part: Measured) -> Canvas:
    canvas = Canvas(figsize=(6.5, 3.0), dpi=80, layout="constrained")
    axis = canvas.subplots()
    for i, cell in enumerate(part.figure.cells):
        for seed, result in enumerate(part.results.get(cell.label, ())):
            curve = result["curve"]
            share = [100 * (tenth + 0.5) / len(curve) for tenth in range(len(curve))]
            axis.plot(share, curve, color=f"C{i}", label=cell.label if seed == 0 else None)
    _frame(axis, part.figure.curve)
    axis.set_xlabel("% of the run")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return canvas


def _frame(axis: Axes, metric: str) -> None:
    axis.set_title(METRICS[metric], fontsize=10)
    frame(axis)


def _draw_lines(axis: Axes, part: Measured, metric: str) -> None:
    for name in dict.fromkeys(c.series for c in part.figure.cells):
        cells = [c for c in part.figure.cells if c.series == name and part.values(c.label, metric)]
        found = [summarize(part.values(c.label, metric)) for c in cells]
        axis.errorbar(
            [c.x or 0 for c in cells],
            [s.mean for s in found],
            [s.std or 0 for s in found],
            marker="o",
            markersize=4,
            capsize=3,
            label=name,
        )
    if part.figure.log_x:
        axis.set_xscale("log", base=2)
    axis.set_xlabel(part.figure.x_label)


def _draw_rows(axis: Axes, part: Measured, metric: str) -> None:
    labels = [c.label for c in part.figure.cells if part.results.get(c.label)][::-1]
    for row, label in enumerate(labels):
        values = part.values(label, metric)
        if values:
            found = summarize(values)
            axis.errorbar(found.mean, row, xerr=found.std or 0, fmt="o", color="C0", capsize=3)
            axis.plot(values, [row] * len(values), "|", color="C1")  # the seeds
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(-0.5, len(labels) - 0.5)


def _machine() -> dict[str, str]:
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per cell, torch "
        f"{torch.__version__}",
        "commit": git.stdout.strip() or "unknown",
    }

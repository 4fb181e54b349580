"""A report of runs: tables, differences, published numbers, curves; Markdown, JSON and HTML.

report = build_report(read_runs(paths), "out")
print(report.summary())
report.write("out")  # report.md, report.json and report.html, beside the pictures
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from moco_common.errors import UserError
from moco_common.files import replace_text
from moco_common.html_page import render_page
from moco_det.report.curves import TITLES, training_curves
from moco_det.report.groups import group_runs
from moco_det.report.runs import Run
from moco_det.report.sections import comparison_lines, details, deviations, provenance_lines
from moco_det.report.tables import COLUMNS, Table, build_tables, table_dict

LEGEND = (
    "AP in percent; mean ± sample standard deviation over n runs that differ in the seed only. "
    "Differences are given with Welch's 95 % confidence interval, per comparison."
)
TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Report:
    """A finished report, as `build_report` returns it.

    Attributes:
        tables: one per protocol and data set.
        pretraining: the pre-training runs.
        figures: caption -> picture, apart from those of the tables.
        notes: problems found in the runs.
    """

    tables: Sequence[Table]
    pretraining: Sequence[Run]
    figures: Mapping[str, str | Path]
    notes: Sequence[str]

    def content(self) -> dict[str, Any]:
        """The content of the page and of the Markdown file as plain values."""
        tables = [
            {
                "title": f"{table.protocol or 'Own configuration'} on {table.dataset}",
                "scores": table.rows(COLUMNS),
                "sources": list(dict.fromkeys(row.source for row in table.reference)),
                "note": table.reference_note,
                "comparisons": comparison_lines(table),
                "provenance": provenance_lines(table),
                "deviations": deviations(table),
                "details": details(table),
                "figures": table.analysis.figures if table.analysis else {},
            }
            for table in self.tables
        ]
        return {
            "title": "Report",
            "legend": LEGEND,
            "tables": tables,
            "pretraining": pretraining_rows(self.pretraining) if self.pretraining else None,
            "pictures": self.figures,
            "notes": self.notes,
        }

    def text(self) -> str:
        """The report as Markdown; its tables are aligned, so that it reads as plain text too."""
        content = self.content()
        parts = [f"# {content['title']}", LEGEND]
        for table in content["tables"]:
            parts += [f"## {markdown(table['title'])}", _markdown_grid(*table["scores"])]
            parts += [f"Published numbers: {markdown(source)}." for source in table["sources"]]
            parts += [markdown(table["note"] or "")]
            parts += [_markdown_bullets(table[key]) for key in ("comparisons", "provenance")]
            for detail in table["details"]:
                parts += [f"### {markdown(detail.title)}", markdown(detail.note)]
                parts += [_markdown_grid(detail.head, detail.rows)]
            for heading, lines in table["deviations"]:
                parts += [f"### {markdown(heading)}", _markdown_bullets(lines)]
        if content["pretraining"]:
            parts += ["## Pre-training", _markdown_grid(*content["pretraining"])]
        if self.notes:
            parts += ["## Notes", _markdown_bullets(self.notes)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def summary(self) -> str:
        """The main tables and the differences, for a terminal."""
        content = self.content()
        parts = []
        for table in content["tables"]:
            parts += [table["title"], _grid(*table["scores"]), table["note"]]
            parts += [_bullets(table["comparisons"]), _bullets(table["provenance"])]
        if content["pretraining"]:
            parts += ["Pre-training", _grid(*content["pretraining"])]
        parts += [_bullets(self.notes)]
        return "\n\n".join(part for part in parts if part)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values (JSON without NaN)."""
        return {
            "format": "moco-det/report/1",
            "tables": [table_dict(table) for table in self.tables],
            "pretraining": [_pretraining_dict(run) for run in self.pretraining],
            "notes": list(self.notes),
        }

    def write(self, folder: str | Path) -> Path:
        """Write report.md, report.json and report.html, replacing earlier ones.

        Args:
            folder: output directory; created if missing.

        Returns:
            The path of the HTML page, which is self-contained: all pictures are inside.
        """
        folder = Path(folder)
        replace_text(folder / "report.md", self.text())
        values = json.dumps(self.as_dict(), indent=1, allow_nan=False)
        replace_text(folder / "report.json", values + "\n")
        return replace_text(folder / "report.html", render_page(TEMPLATE, **self.content()))


def build_report(
    runs: Sequence[Run],
    folder: str | Path | None = None,
    num_images: int = 4,
    pictures: Mapping[str, str | Path] | None = None,
) -> Report:
    """Group, tabulate, compare and analyse runs.

    Args:
        folder: where the pictures are drawn (curves, and detections where runs kept their
            predictions); None for a report without pictures.
        num_images: number of images of each kind (best, worst, most different) to draw.
        pictures: caption -> further picture to show.

    Raises:
        UserError: no run was evaluated or logged a training curve.
    """
    groups, oddities = group_runs(runs)
    notes = [problem for run in runs for problem in run.problems] + oddities
    silent = [r for r in runs if r.results is None and r.records and not r.is_pretraining]
    notes += [f"{run.path} is not evaluated: it appears in the curves only" for run in silent]
    if not groups and not any(len(run.records) > 1 for run in runs):
        raise UserError("nothing to report: " + "; ".join(notes))
    folder = None if folder is None else Path(folder)
    tables, failures = build_tables(groups, folder, num_images)
    figures: dict[str, str | Path] = {}
    if folder is not None and any(len(run.series(key)[0]) > 1 for run in runs for key in TITLES):
        labels = {run.path: group.label for group in groups for run in group.runs}
        curves: dict[str, list[Run]] = {}
        for run in runs:
            curves.setdefault(labels.get(run.path, run.label), []).append(run)
        figures["Training curves"] = training_curves(curves, folder / "curves.png")
    pretraining = [run for run in runs if run.is_pretraining]
    return Report(tables, pretraining, {**figures, **(pictures or {})}, notes + failures)


def markdown(text: str) -> str:
    """Escape what would start markup or end a table cell, and join lines."""
    return re.sub(r"[|<]", r"\\\g<0>", " ".join(text.splitlines()))


def pretraining_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Loss and accuracy of each pre-training run, averaged over the last 5 % of its records."""
    rows = []
    for values in map(_pretraining_dict, runs):
        shown = [values[key] for key in ("loss", "chance_loss", "accuracy")]
        cells = ["-" if value is None else f"{value:.3f}" for value in shown]
        rows.append([values["label"], str(values["iterations"]), *cells])
    return ["run", "iterations", "loss", "chance loss", "accuracy"], rows


def _pretraining_dict(run: Run) -> dict[str, Any]:
    last: dict[str, float | None] = {}
    for key in ("loss", "accuracy"):
        values = run.series(key)[1]
        tail = values[-max(1, len(values) // 20) :]
        last[key] = sum(tail) / len(tail) if tail else None
    return {
        "label": run.path.name,
        "run": str(run.path),
        "iterations": run.records[-1]["iteration"] if run.records else 0,
        **last,
        "chance_loss": run.chance_loss,
    }


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    align = ["left", *["right"] * (len(head) - 1)]
    return str(tabulate(list(rows), list(head), "github", colalign=align, disable_numparse=True))


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _markdown_grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return _grid([markdown(cell) for cell in head], [[markdown(c) for c in row] for row in rows])


def _markdown_bullets(lines: Iterable[str]) -> str:
    return _bullets(map(markdown, lines))

"""Runs -> one report: means and spreads, differences, published numbers, curves; one HTML page.

report = build_report(read_runs(paths))
report.analyse("out")
print(report.text())
report.write("out")  # report.md, report.json, report.html and the pictures on it
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from moco_common.errors import UserError
from moco_common.files import replace_text
from moco_det.report.analyse import analyse_tables, training_figure
from moco_det.report.breakdowns import analysis_dict, details, deviations
from moco_det.report.groups import group_runs
from moco_det.report.page import render_page
from moco_det.report.runs import Run
from moco_det.report.tables import (
    COLUMNS,
    Table,
    build_tables,
    comparison_lines,
    provenance_lines,
    table_dict,
)

LEGEND = (
    "AP in percent; mean ± sample standard deviation over n runs that differ in the seed only. "
    "Differences carry Welch's 95 % confidence interval, per comparison."
)


@dataclass
class Report:
    """What `build_report` found; `text`, `as_dict` and `write` show it."""

    tables: list[Table]
    pretraining: list[Run]
    runs: list[Run]
    notes: list[str]

    def analyse(self, folder: str | Path, num_images: int = 4) -> None:
        """Add what the kept predictions show: curves, sizes, confusions, best and worst images.

        Args:
            folder: where the pictures go.
            num_images: how many images of each kind to draw; 0 for none.
        """
        self.notes += analyse_tables(self.tables, folder, num_images)

    def content(self) -> dict[str, Any]:
        """What the page and the Markdown show, as plain values: one wording for both."""
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
                "figures": table.figures,
            }
            for table in self.tables
        ]
        pretraining = pretraining_rows(self.pretraining) if self.pretraining else None
        return {
            "legend": LEGEND, "tables": tables, "pretraining": pretraining, "notes": self.notes
        }  # fmt: skip

    def text(self) -> str:
        """The report as Markdown whose tables are aligned, so that it also reads as plain text."""
        content = self.content()
        parts = ["# Report", LEGEND]
        for table in content["tables"]:
            parts += [f"## {table['title']}", _grid(*table["scores"])]
            parts += [f"Published numbers: {source}." for source in table["sources"]]
            parts += [table["note"], _bullets(table["comparisons"]), _bullets(table["provenance"])]
            for detail in table["details"]:
                parts += [f"### {detail.title}", detail.note, _grid(detail.head, detail.rows)]
            for heading, lines in table["deviations"]:
                parts += [f"### {heading}", _bullets(lines)]
        if content["pretraining"]:
            parts += ["## Pre-training", _grid(*content["pretraining"])]
        if self.notes:
            parts += ["## Notes", _bullets(self.notes)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def summary(self) -> str:
        """The main tables and the differences, for a terminal."""
        parts = []
        for table in self.content()["tables"]:
            parts += [table["title"], _grid(*table["scores"]), table["note"]]
            parts += [_bullets(table["comparisons"]), _bullets(table["provenance"])]
        if self.pretraining:
            parts += ["Pre-training", _grid(*pretraining_rows(self.pretraining))]
        parts += [_bullets(self.notes)]
        return "\n\n".join(part for part in parts if part)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values (JSON without NaN)."""
        return {
            "format": "moco-det/report/1",
            "tables": [{**table_dict(t), "analysis": analysis_dict(t)} for t in self.tables],
            "pretraining": [_pretraining_dict(run) for run in self.pretraining],
            "notes": self.notes,
        }

    def write(self, folder: str | Path, pictures: Mapping[str, str | Path] | None = None) -> Path:
        """Write report.md, report.json, report.html and (where runs logged any) curves.png.

        Args:
            folder: made if missing; earlier reports in it are replaced.
            pictures: caption -> picture to show on the page as well.

        Returns:
            the path of the HTML page, which holds all its pictures and needs nothing else.
        """
        folder = Path(folder)
        shown = {**training_figure(self.runs, self.tables, folder), **(pictures or {})}
        replace_text(folder / "report.md", self.text())
        values = json.dumps(self.as_dict(), indent=1, allow_nan=False)
        replace_text(folder / "report.json", values + "\n")
        return replace_text(folder / "report.html", render_page(self.content(), shown))


def build_report(runs: Sequence[Run]) -> Report:
    """Group the runs, tabulate and compare them.

    Raises:
        UserError: nothing was evaluated and no run logged a training curve.
    """
    groups, notes = group_runs(runs)
    notes = [problem for run in runs for problem in run.problems] + notes
    pretraining = [run for run in runs if run.is_pretraining]
    silent = [r for r in runs if r.results is None and r.records and not r.is_pretraining]
    notes += [f"{run.path} is not evaluated: it appears in the curves only" for run in silent]
    if not groups and not any(len(run.records) > 1 for run in runs):
        raise UserError("nothing to report: " + "; ".join(notes))
    return Report(build_tables(groups), pretraining, list(runs), notes)


def pretraining_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Where each pre-training run stands: means over the last twentieth of what it logged."""
    rows = []
    for values in map(_pretraining_dict, runs):
        shown = [values[key] for key in ("loss", "log_k_plus_1", "accuracy")]
        cells = ["-" if value is None else f"{value:.3f}" for value in shown]
        rows.append([values["label"], str(values["iterations"]), *cells])
    return ["run", "iterations", "loss", "log(K+1)", "accuracy"], rows


def _pretraining_dict(run: Run) -> dict[str, Any]:
    queue = run.config.get("MOCO.QUEUE_SIZE")
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
        "log_k_plus_1": math.log(queue + 1) if queue else None,
    }


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["left", *["right"] * (len(head) - 1)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return str(tabulate(cells, list(head), "github", colalign=align, disable_numparse=True))


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)

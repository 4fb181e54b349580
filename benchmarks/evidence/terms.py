"""The building blocks of the evidence: cells, expectations, figures, and names of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A training (or untrained weights) and its probe, run once per seed.

    Attributes:
        label: row name in the table; identical cells of several figures are run once.
        overrides: KEY -> value, applied to evidence.yaml.
        x: position on the horizontal axis; None to plot one row per cell.
        series: name of the line of the plot it belongs to.
        trained: False for untrained weights, whose BN statistics are fitted to the images.
        script: file in this folder that runs the cell.
    """

    label: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    x: float | None = None
    series: str = ""
    trained: bool = True
    script: str = "cell.py"


@dataclass(frozen=True)
class Expectation:
    """The expectation that ``better`` is above ``worse`` in ``metric``.

    Attributes:
        text: the expectation in words.
        better, worse: label of a cell of the figure; or several, averaged within each seed.
        metric: name of the metric, a key of `METRICS`.
    """

    text: str
    better: str | tuple[str, ...]
    worse: str | tuple[str, ...]
    metric: str = "knn"

    @property
    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Labels of the two sides."""
        better, worse = (
            (side,) if isinstance(side, str) else side for side in (self.better, self.worse)
        )
        return better, worse


@dataclass(frozen=True)
class Figure:
    """A section of the document.

    Attributes:
        metrics: metrics in the order of the table's columns; plots show the first three.
        best: name the best cell and those it significantly beats.
        detection: also fine-tune the cells as detectors.
        data: "given" for the folders of the command line, "scenes" for the demo's images.
        curve: metric to plot over the run, from the tenths in the results' ``curve``.
    """

    name: str
    title: str
    about: str
    cells: Sequence[Cell]
    metrics: Sequence[str]
    expectations: Sequence[Expectation] = ()
    best: bool = True
    x_label: str = ""
    log_x: bool = False
    detection: bool = False
    data: str = "given"
    curve: str = ""


RANDOM = "random weights"
METRICS = {
    "knn": "kNN top-1 (%)",
    "linear": "linear top-1 (%)",
    "accuracy": "contrastive accuracy (%)",
    "loss": "loss",
    "spread": "spread",
    "company": "nearest key from the query's company (%)",
    "rss": "peak memory of the training (MB)",
    "AP": "box AP (%)",
    "AP50": "box AP50 (%)",
}

"""What the evidence is made of: a cell, an expectation, a figure, and the names of the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One training, or none, and its probe; run once a seed.

    Attributes:
        label: its row in the table; equal cells of several figures are run once.
        overrides: KEY -> value on top of evidence.yaml.
        x: place on the horizontal axis; None for one place a row.
        series: which line of the plot it belongs to.
        trained: False for untrained weights, whose BN statistics are fitted to the images.
        script: beside this file; runs the cell.
    """

    label: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    x: float | None = None
    series: str = ""
    trained: bool = True
    script: str = "cell.py"


@dataclass(frozen=True)
class Expectation:
    """``better`` is above ``worse`` in ``metric``.

    Attributes:
        better, worse: label of one of the figure's cells; or several, of which the mean is taken
            within each seed.
    """

    text: str
    better: str | tuple[str, ...]
    worse: str | tuple[str, ...]
    metric: str = "knn"

    @property
    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Labels of either side."""
        better, worse = (
            (side,) if isinstance(side, str) else side for side in (self.better, self.worse)
        )
        return better, worse


@dataclass(frozen=True)
class Figure:
    """A section of the document.

    Attributes:
        metrics: in the order of the table's columns; the plots show the first three.
        best: whether to say which cell is best, and what it beats.
        detection: whether its cells are fine-tuned as detectors, too.
        data: "given", the folders of the command line, or "scenes", the demo's images.
        curve: metric that the plot shows over the run, by the tenths in the results' ``curve``.
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

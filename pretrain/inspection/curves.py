"""Training curves of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from moco_common.figures import chance_line, name_lines, panels
from pretrain.engine.health_monitor import Monitor
from pretrain.inspection.geometry import Geometry
from pretrain.methods.base import REMEDIES

Records = Sequence[Mapping[str, float]]
# Title and factor of each recorded value, in the order of the panels.
PANELS: dict[str, tuple[str, float]] = {
    "loss": ("loss", 1),
    "accuracy": ("contrastive accuracy (%)", 100),
    "top1": ("top-1 accuracy (%)", 100),
    "spread": ("spread of the embeddings", 1),
    "rank_me": ("RankMe of the embeddings", 1),
    "knn_top1": ("kNN accuracy (%)", 1),
    "queue_fill": ("queue filled (%)", 100),
    "lr": ("learning rate", 1),
    "images_per_second": ("images per second", 1),
}
# Okabe and Ito's palette, distinguishable with colour-blindness.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")


def draw_curves(
    runs: Mapping[str, Records],
    *,
    chance_loss: float | None = None,
    keys: Sequence[str] = tuple(PANELS),
    columns: int = 3,
) -> Figure | None:
    """Draw recorded values against iterations, one panel per key that some run has recorded.

    Values are drawn as logged: each is a mean over the steps since the previous record.

    Args:
        runs: name -> records; several runs share the panels, with a legend.
        chance_loss: loss of a random encoder, drawn as a dashed line; None for no line.
        keys: keys of `PANELS`.

    Returns:
        The figure, or None if nothing was recorded.
    """
    shown = [key for key in keys if any(_series(records, key)[0] for records in runs.values())]
    if not shown:
        return None
    figure, axes = panels(len(shown), columns, (3.4, 2.5), margin=0.3)
    lines = {}
    for axis, key in zip(axes, shown, strict=True):
        title, factor = PANELS[key]
        for i, (name, records) in enumerate(runs.items()):
            steps, values = _series(records, key)
            marker = "o" if len(steps) < 12 else ""
            colour = COLOURS[i % len(COLOURS)]
            scaled = [factor * v for v in values]
            (lines[name],) = axis.plot(steps, scaled, marker=marker, ms=3, lw=1.4, color=colour)
        if key == "loss" and chance_loss is not None:
            chance_line(axis, chance_loss)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration", fontsize=8)
        axis.tick_params(labelsize=8)
    if len(runs) > 1:
        name_lines(figure, lines)
    return figure


def draw_spectra(geometries: Mapping[str, Geometry]) -> Figure:
    """Draw the singular values of each set of vectors, relative to the largest, by rank."""
    figure, (axis,) = panels(1, 1, (5, 3.2), margin=0)
    for (name, geometry), colour in zip(geometries.items(), COLOURS, strict=False):
        values = [max(s, 1e-6) for s in geometry.spectrum]
        label = f"{name}: effective rank {geometry.effective_rank:.0f} of {geometry.full_rank}"
        axis.plot(range(1, len(values) + 1), values, color=colour, lw=1.4, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("rank of the singular value", fontsize=8)
    axis.set_ylabel("relative to the largest", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, frameon=False)
    return figure


def last_words(
    records: Records,
    chance_loss: float | None,
    patience: int,
    remedies: Mapping[str, str] = REMEDIES,
) -> list[str]:
    """Warnings of the run's own monitor at its end: a collapse, a plateau or a leak."""
    complete = [r for r in records if "loss" in r and "spread" in r]
    if not complete or complete[-1]["iteration"] < patience:
        return []
    monitor = Monitor(chance_loss, patience=0, remedies=remedies)
    warnings = [
        monitor.observe(
            int(r["iteration"]), r["loss"], r["spread"], r.get("accuracy", 0.0), r.get("rank_me")
        )
        for r in complete[-3:]
    ]
    return [text for text in warnings if text]


def _series(records: Records, key: str) -> tuple[list[float], list[float]]:
    points = [
        (record["iteration"], record[key])
        for record in records
        if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]
    return [step for step, _ in points], [value for _, value in points]

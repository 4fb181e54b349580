"""Curves of training and of precision, drawn without a display (Agg canvas, no global state)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from moco_common.errors import UserError
from moco_common.figures import chance_line, literal, name_lines, panels, save_figure
from moco_det.report.runs import Run, read_run

TITLES = {
    "loss": "pre-training: loss",
    "accuracy": "pre-training: contrastive accuracy",
    "total_loss": "total loss",
    "loss_cls": "classification loss",
    "loss_box_reg": "box regression loss",
    "loss_mask": "mask loss",
    "loss_rpn_cls": "RPN objectness loss",
    "loss_rpn_loc": "RPN localisation loss",
    "bbox/AP": "box AP (%)",
    "bbox/AP50": "box AP50 (%)",
    "segm/AP": "mask AP (%)",
}
SMOOTHING = 0.1
"""Window of the moving average as a share of a curve's points."""
Runs = Mapping[str, "Run | str | Path | Sequence[Run | str | Path]"]


def training_curves(runs: Runs, path: str | Path, keys: Sequence[str] | None = None) -> Path:
    """Draw scalars of metrics.json against iterations: one panel per key, one colour per label.

    Thin lines are the values as logged, thick ones a centred moving average over 10 % of the points
    of a curve (stated in the figure). A dashed line marks the chance loss of a pre-training run,
    the loss of an encoder that has learned nothing, if its method has one.

    Args:
        runs: label -> a run directory, or several (trials), which share the label's colour.
        path: the picture to write (.png).
        keys: scalars to draw; default: those of `TITLES` that some run logged at least twice.

    Raises:
        UserError: no run logged any of the keys.
    """
    members = {label: _as_runs(value) for label, value in runs.items()}
    everything = [run for group in members.values() for run in group]
    wanted = list(TITLES) if keys is None else list(keys)
    least = 2 if keys is None else 1
    shown = [k for k in wanted if any(len(run.series(k)[0]) >= least for run in everything)]
    if not shown:
        raise UserError(
            f"no training curves to draw: metrics.json of {', '.join(members)} "
            f"{'is missing or empty' if keys is None else 'has none of ' + ', '.join(wanted)}"
        )

    figure, axes = panels(len(shown), 3, (5.2, 3.4), margin=0.8)
    colors = _colors(len(members))
    lines: dict[str, Line2D] = {}
    for axis, key in zip(axes, shown, strict=True):
        for index, (label, group) in enumerate(members.items()):
            for run in group:
                line = _curve(axis, run, key, colors[index % len(colors)])
                if line is not None:
                    lines.setdefault(label, line)
        if key == "loss":
            for level in {level for run in everything if (level := run.chance_loss) is not None}:
                chance_line(axis, level)
        axis.set_title(literal(TITLES.get(key, key)), fontsize=10)
        axis.set_xlabel("iteration")
    name_lines(figure, {label: lines[label] for label in members if label in lines})
    figure.supxlabel(
        f"thin: as logged; thick: moving average over {SMOOTHING:.0%} of the points", fontsize=8
    )
    return save_figure(figure, path)


def precision_recall_curves(
    curves: Mapping[str, Sequence[np.ndarray]],
    class_names: Sequence[str],
    path: str | Path,
    most_classes: int = 10,
) -> Path | None:
    """Draw precision over recall: the mean over classes at IoU 0.50 and 0.75, then each class.

    Thick lines are the mean over the runs of a label, thin ones single runs. Of many classes, those
    in which the labels differ most at IoU 0.50 are shown (stated in the figure).

    Args:
        curves: label -> (2, R, C) of each run: precision in [0, 1] at IoU 0.50 and 0.75 and R
            recalls from 0 to 1; NaN for a class without objects.
        path: the picture to write (.png).

    Returns:
        ``path``, or None if no class has objects.
    """
    runs = {label: np.stack(items) for label, items in curves.items()}  # runs x 2 x R x C
    means = np.stack([items.mean(axis=0) for items in runs.values()])  # labels x 2 x R x C
    usable = np.flatnonzero(np.isfinite(means).all(axis=(0, 1, 2)))
    if not len(usable):
        return None
    contrast = np.ptp(means[:, 0].mean(axis=1), axis=0)[usable]
    chosen = usable[np.argsort(-contrast, kind="stable")][:most_classes]
    several = len(usable) > 1
    whole = f"mean of {len(usable)} classes" if several else str(class_names[usable[0]])
    parts = [(f"{whole}, IoU {iou}", index, usable) for index, iou in enumerate(("0.50", "0.75"))]
    if several:
        parts += [(f"{class_names[c]}, IoU 0.50", 0, np.array([c])) for c in sorted(chosen)]
    columns = 3 if len(parts) <= 6 else 4
    figure, axes = panels(len(parts), columns, (3.6, 2.9), margin=0.8, sharex=True, sharey=True)
    recall = np.linspace(0, 1, means.shape[2])
    lines = {}
    for axis, (title, iou, classes) in zip(axes, parts, strict=True):
        for (label, items), color in zip(runs.items(), _colors(len(runs)), strict=False):
            values = items[:, iou][:, :, classes].mean(axis=2)  # runs x R
            if len(values) > 1:
                axis.plot(recall, values.T, color=color, linewidth=0.6, alpha=0.4)
            lines[label] = axis.plot(recall, values.mean(axis=0), color=color, linewidth=1.8)[0]
        axis.set_title(literal(title), fontsize=10)
        axis.tick_params(labelbottom=True)  # also above an empty panel
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1.02)
    name_lines(figure, lines)
    note = "recall (horizontal), precision (vertical); thick: mean over the runs; thin: each run"
    if len(chosen) < len(usable):
        note += f"; the {len(chosen)} classes in which the groups differ most"
    figure.supxlabel(note, fontsize=8)
    return save_figure(figure, path)


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average; near both ends the window shrinks symmetrically."""
    series = np.asarray(values, dtype=float)
    total = np.concatenate([[0.0], np.cumsum(series)])
    here = np.arange(len(series))
    reach = np.minimum(np.minimum(here, len(series) - 1 - here), window // 2)
    means: np.ndarray = (total[here + reach + 1] - total[here - reach]) / (2 * reach + 1)
    return means


def _colors(count: int) -> Sequence[tuple[float, ...]]:
    colors: Sequence[tuple[float, ...]]
    colors = colormaps["tab10" if count <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    return [colors[index % len(colors)] for index in range(count)]


def _as_runs(value: Run | str | Path | Sequence[Run | str | Path]) -> list[Run]:
    several = [value] if isinstance(value, Run | str | Path) else value
    return [item if isinstance(item, Run) else read_run(item) for item in several]


def _curve(axis: Axes, run: Run, key: str, color: tuple[float, ...]) -> Line2D | None:
    iterations, values = run.series(key)
    if not values:
        return None
    window = round(SMOOTHING * len(values))
    if window < 3:  # the average of so few points would repeat them
        marker = "o" if len(values) < 40 else ""
        return axis.plot(iterations, values, marker, ls="-", ms=3, color=color, linewidth=1.5)[0]
    axis.plot(iterations, values, color=color, linewidth=0.6, alpha=0.35)
    return axis.plot(iterations, smooth(values, window), color=color, linewidth=1.8)[0]

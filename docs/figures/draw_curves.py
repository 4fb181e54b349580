"""Draws the curves of docs/reading-the-curves.md from the records of real runs in curves/ (SVG,
beside itself): python docs/figures/draw_curves.py. With a name and a run directory it first takes
in the run's record: python docs/figures/draw_curves.py healthy runs/healthy."""

import json
import sys
from pathlib import Path

import matplotlib

from moco_common.figures import save_figure
from pretrain.inspection.curves import draw_curves
from pretrain.inspection.run_directory import open_run

HERE = Path(__file__).parent
RECORDS = HERE / "curves"
KEPT = ("iteration", "loss", "accuracy", "spread", "knn_top1")

# Figure: the runs in it by label, and what is drawn of them.
FIGURES = {
    "curves-healthy": ({"healthy": "healthy"}, ("loss", "accuracy", "spread", "knn_top1")),
    "curves-plateau": (
        {"small-data": "healthy", "moco-v2": "plateau"},
        ("loss", "accuracy", "spread", "knn_top1"),
    ),
    "curves-collapse": (
        {"SwAV, epsilon 0.05": "swav", "SwAV, epsilon 1": "collapse"},
        ("loss", "accuracy", "spread", "knn_top1"),
    ),
}


def take_in(name: str, folder: str) -> None:
    """Keep what is drawn of a run's record, four digits of each number."""
    run = open_run(folder)
    records = [
        {k: r[k] if k == "iteration" else float(f"{r[k]:.4g}") for k in KEPT if k in r}
        for r in run.records
    ]
    content = {"chance_loss": run.build().chance_loss, "records": records}
    lines = json.dumps(content).replace('{"iter', '\n{"iter')
    (RECORDS / f"{name}.json").write_text(lines + "\n", encoding="utf-8")


def draw(name: str) -> None:
    """One figure of `FIGURES`."""
    runs, keys = FIGURES[name]
    found = {
        label: json.loads((RECORDS / f"{run}.json").read_text()) for label, run in runs.items()
    }
    chance = next(iter(found.values()))["chance_loss"]
    records = {label: content["records"] for label, content in found.items()}
    figure = draw_curves(records, chance_loss=chance, keys=keys, columns=2)
    assert figure is not None
    save_figure(figure, HERE / f"{name}.svg")


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "moco-det"  # the same picture, byte for byte, each time
    if sys.argv[1:]:
        take_in(*sys.argv[1:])
    for figure in FIGURES:
        draw(figure)

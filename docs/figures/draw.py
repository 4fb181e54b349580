"""Draws the figures of the documentation (SVG, beside itself): python docs/figures/draw.py."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle, Wedge

HERE = Path(__file__).parent
INK, PAPER, MUTED = "#1f2933", "#ffffff", "#9aa5b1"
# One colour a rank (or group): Okabe and Ito's palette, which colour-blind readers tell apart.
RANKS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")


def canvas(width: float, height: float) -> Axes:
    plt.rcParams.update({"svg.hashsalt": "moco-det", "font.size": 10, "text.color": INK})
    axes = plt.figure(figsize=(width, height), facecolor=PAPER).add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return axes


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str = PAPER) -> None:
    axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor=INK, linewidth=1))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center")


def arrow(
    axes: Axes, start: Sequence[float], end: Sequence[float], *, curve: float = 0, colour: str = INK
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            tuple(start),
            tuple(end),
            arrowstyle="-|>",
            mutation_scale=12,
            linewidth=1.2,
            color=colour,
            connectionstyle=f"arc3,rad={curve}",
        )
    )


def save(axes: Axes, name: str) -> None:
    axes.figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(axes.figure)


def road() -> None:
    """The whole project in one row."""
    axes = canvas(10.4, 1.9)
    stations = ("photographs", "two views", "encoders\n+ queue", "checkpoint")
    later = ("Detectron2\nweights", "protocol", "detector", "AP, report")
    for i, text in enumerate((*stations, *later)):
        box(axes, 0.1 + 1.3 * i, 0.5, 1.1, 0.8, text, "#e8f1fa" if i < 4 else "#fdf3e0")
        if i:
            arrow(axes, (0.1 + 1.3 * i - 0.2, 0.9), (0.1 + 1.3 * i, 0.9))
    axes.text(2.6, 0.22, "pretrain/", ha="center", family="monospace")
    axes.text(7.8, 0.22, "moco_det/", ha="center", family="monospace")
    axes.text(5.2, 1.6, "tools/convert.py proves that every tensor arrived", ha="center")
    arrow(axes, (5.2, 1.5), (5.2, 1.0), colour=MUTED)
    save(axes, "road")


def moco_step() -> None:
    """One step: queries learn, keys follow, the queue remembers."""
    axes = canvas(8, 3.6)
    box(axes, 0.1, 2.4, 1.2, 0.7, "view 1\n$x_q$")
    box(axes, 0.1, 0.6, 1.2, 0.7, "view 2\n$x_k$")
    box(axes, 2, 2.4, 1.6, 0.7, "encoder $f_q$", "#e8f1fa")
    box(axes, 2, 0.6, 1.6, 0.7, "encoder $f_k$", "#fdf3e0")
    box(axes, 4.4, 2.4, 0.8, 0.7, "$q$", "#e8f1fa")
    box(axes, 4.4, 0.6, 0.8, 0.7, "$k$", "#fdf3e0")
    box(axes, 6.2, 2.4, 1.6, 0.7, "InfoNCE")
    box(axes, 6.2, 0.6, 1.6, 0.7, "queue of K keys", "#fdf3e0")
    for y in (2.75, 0.95):
        arrow(axes, (1.3, y), (2, y))
        arrow(axes, (3.6, y), (4.4, y))
    arrow(axes, (5.2, 2.75), (6.2, 2.75))
    arrow(axes, (5.2, 1.2), (6.3, 2.4))
    arrow(axes, (5.2, 0.95), (6.2, 0.95))
    arrow(axes, (7, 1.3), (7, 2.4))
    axes.text(7.1, 1.8, "negatives", va="center")
    axes.text(5.35, 1.85, "positive", ha="right", va="center")
    axes.text(5.7, 0.75, "enqueued last", ha="center", va="top", fontsize=8)
    arrow(axes, (2.8, 2.4), (2.8, 1.3))
    axes.text(2.9, 1.85, r"$\theta_k \leftarrow m\,\theta_k + (1-m)\,\theta_q$", va="center")
    arrow(axes, (6.9, 3.1), (3, 3.1), curve=0.18, colour=RANKS[0])
    axes.text(4.9, 3.28, "gradient, to $f_q$ alone", ha="center", color=RANKS[0])
    save(axes, "moco-step")


def queue_ring() -> None:
    """A batch that reaches the end of the ring goes on at its start."""
    axes = canvas(6.4, 3.1)
    axes.set_aspect("equal")
    slots, start, batch = 10, 8, 4
    for i in range(slots):
        new = (i - start) % slots < batch
        angle = 90 - 360 * i / slots
        axes.add_patch(
            Wedge(
                (1.6, 1.5),
                1.3,
                angle - 360 / slots,
                angle,
                width=0.45,
                facecolor="#e69f00" if new else "#e8f1fa",
                edgecolor=INK,
            )
        )
    axes.text(1.6, 1.5, "K = 10\nslots", ha="center", va="center")
    lines = (
        "A batch of 4 keys arrives at slot 8:",
        "it takes 8 and 9, and goes on at 0 and 1.",
        "",
        "K need not be a multiple of the batch.",
        "Of a batch longer than the queue, the last",
        "K keys stay.",
    )
    axes.text(3.3, 1.6, "\n".join(lines), va="center")
    save(axes, "queue-ring")


def shuffle_bn() -> None:
    """Which images share the batch statistics, for queries and for keys."""
    axes = canvas(10.6, 3.9)
    permutation = (5, 2, 7, 0, 3, 6, 1, 4)
    width = 0.42

    def row(y: float, order: Sequence[int], title: str) -> None:
        axes.text(0.1, y + 0.2, title, va="center")
        for place, image in enumerate(order):
            x = 2.6 + place * width * 1.12 + (place // 2) * 0.35
            axes.add_patch(
                Rectangle((x, y), width, 0.4, facecolor=RANKS[image // 2], edgecolor=INK)
            )
            axes.text(x + width / 2, y + 0.2, str(image), ha="center", va="center", color=PAPER)
            if place % 2 == 0:
                axes.add_patch(
                    Rectangle(
                        (x - 0.08, y - 0.08),
                        2 * width * 1.12 + 0.1,
                        0.56,
                        fill=False,
                        edgecolor=MUTED,
                        linestyle="--",
                    )
                )

    row(3.1, range(8), "queries, in their groups:")
    row(1.9, permutation, "keys, permuted:")
    row(0.7, range(8), "keys, put back:")
    arrow(axes, (1.2, 1.75), (1.2, 1.2))
    axes.text(1.3, 1.45, "encode, then undo", va="center", fontsize=9)
    text = (
        "Dashed: images that are\nnormalised together, on one\nGPU, or in one virtual group\n"
        "of a single process.\n\nA key is encoded in other\ncompany than its query, so\n"
        "batch statistics cannot give\nthe answer away."
    )
    axes.text(7.75, 2.1, text, va="center", fontsize=9)
    save(axes, "shuffle-bn")


if __name__ == "__main__":
    road()
    moco_step()
    queue_ring()
    shuffle_bn()

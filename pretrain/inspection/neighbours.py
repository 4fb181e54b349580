"""Sample images, their features, and their nearest neighbours by these features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from moco_common.errors import UserError
from pretrain.data.decoding import decode
from pretrain.data.source_base import Source
from pretrain.modeling.resnet import ResNet
from pretrain.probe.datasets import LabelledImages, Preprocessing
from pretrain.probe.features import ArrayCache, Features, Say, extract
from pretrain.probe.knn import nearest
from pretrain.visualization.contact_sheet import GAP, fitted, sheet
from pretrain.visualization.views import first_images

_SIDE = 112  # pixels of a photograph in the picture
_DPI = 100


class HeldImages(Source):
    """The first images of a stream, kept in memory for access by index."""

    def __init__(self, source: Source, n: int, seed: int) -> None:
        encoded = first_images(source, n, seed).items()
        self._images = [(source.name(i), data) for i, data in encoded if isinstance(data, bytes)]
        if not self._images:
            raise UserError(
                "none of the first images of the shards can be read: write the shards again."
            )

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> bytes:
        return self._images[index][1]

    def name(self, index: int) -> str:
        return self._images[index][0]


def sample_images(source: Source, n: int, seed: int) -> LabelledImages:
    """Draw at most n images of a source at random, in the source's order; of a stream, the first.

    Their "labels" are their own numbers, 0 to n - 1, which still identify them after unreadable
    images have been dropped.
    """
    if source.streamed:
        source = HeldImages(source, min(n, len(source)), seed)
    chosen = np.random.default_rng(seed).permutation(len(source))[:n]
    rows = np.sort(chosen)
    return LabelledImages(source, rows, np.arange(len(rows)), ())


def class_names(images: LabelledImages) -> list[str] | None:
    """The class folder of each image; None if an image has none."""
    labels = images.source.labels
    if labels is None or (labels[images.rows] < 0).any():
        return None
    return [images.source.classes[i] for i in labels[images.rows].tolist()]


def features_of(
    backbone: ResNet,
    images: LabelledImages,
    crop_size: int,
    *,
    cache: Path | None,
    threads: int,
    say: Say,
) -> Features:
    """Compute (N, C) features of the readable images as the probes do; their ``labels`` are the
    numbers of `sample_images`."""
    return extract(
        backbone,
        images,
        Preprocessing.of(crop_size),
        name="sample",
        cache=ArrayCache(cache) if cache else None,
        batch_size=64,
        threads=threads,
        say=say,
    )


@dataclass(frozen=True)
class Neighbours:
    """Queries and their nearest neighbours.

    Attributes:
        queries: (Q,) int64, numbers of images.
        found: (Q, k) int64, numbers of their neighbours, the nearest first.
        cosine: (Q, k) float, cosine similarity of the features.
    """

    queries: Tensor
    found: Tensor
    cosine: Tensor

    def same_class(self, names: list[str]) -> float:
        """Share of the neighbours in the class folder of their query."""
        pairs = [
            names[q] == names[n]
            for q, row in zip(self.queries.tolist(), self.found.tolist(), strict=True)
            for n in row
        ]
        return float(np.mean(pairs))


def nearest_neighbours(features: Features, queries: Tensor, k: int) -> Neighbours:
    """Find the k images nearest to each query by cosine, except the query itself.

    Args:
        queries: (Q,) rows of ``features``.
    """
    k = min(k, len(features) - 1)
    numbers = features.labels[queries]  # Q
    cosine, found = nearest(features.values, features.labels, features.values[queries], k + 1)
    others = found != numbers[:, None]  # Qx(k+1)
    # With more than k copies of one image, the query may not be among them: drop the last.
    others[others.all(1), -1] = False
    return Neighbours(numbers, found[others].view(-1, k), cosine[others].view(-1, k))


def draw_neighbours(
    images: LabelledImages, neighbours: Neighbours, names: list[str] | None
) -> Figure:
    """Draw the queries on the left and their neighbours on the right, labelled with cosines and
    classes (green if equal to the query's)."""
    numbers = torch.cat([neighbours.queries[:, None], neighbours.found], 1)  # Qx(1+k)
    rows = [[fitted(_pixels(images, i), _SIDE) for i in row] for row in numbers.tolist()]
    for row in rows:
        row.insert(1, np.full((_SIDE + GAP, 2 * GAP, 3), 255, np.uint8))
    picture = sheet(rows)
    height, width, _ = picture.shape
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(picture, interpolation="none", aspect="auto", extent=(0, width, height, 0))
    axis.set_axis_off()
    for y, row in enumerate(numbers.tolist()):
        for x, number in enumerate(row):
            text = "query" if x == 0 else f"{neighbours.cosine[y, x - 1]:.2f}"
            colour = "white"
            if names:
                text += f" {names[number][:14]}"
                colour = "#7dff9b" if x and names[number] == names[row[0]] else "white"
            axis.text(
                x * (_SIDE + GAP) + (2 * GAP if x else 0) + 3,
                (y + 1) * (_SIDE + GAP) - GAP - 4,
                text,
                fontsize=6.5,
                color=colour,
                bbox={"facecolor": "black", "alpha": 0.6, "pad": 1, "linewidth": 0},
                parse_math=False,
                clip_on=True,
            )
    return figure


def _pixels(images: LabelledImages, number: int) -> np.ndarray:
    return decode(images.read(number), min_side=_SIDE, min_area=_SIDE**2)

"""Matching cells and slots that methods made for detection find in two views of an image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.methods.base import Method
from pretrain.methods.correspondence import nearby
from pretrain.visualization.contact_sheet import GAP, enlarged, sheet

NEAR = 0.7  # diagonals of a cell: a match this near to the cell's own place is right, as in PixPro
SHOWN = 12  # matches drawn for an image
_SIDE = 224  # pixels to which smaller views are enlarged
_RIGHT, _WRONG = (0, 158, 115), (213, 94, 0)  # green and red of Okabe and Ito's palette


@dataclass(frozen=True)
class Matches:
    """For each cell of the first view's feature map, the most similar cell of the second's.

    Attributes:
        match: (N, h, w) int64, a cell of the second map, row by row.
        shared: (N, h, w) bool, whether the second view shows the cell's place at all.
        right: (N, h, w) bool, whether the match lies at the cell's place.
        chance: fraction of the shared cells that a random match gets right; 0 if none is shared.
    """

    match: Tensor
    shared: Tensor
    right: Tensor
    chance: float

    @property
    def share(self) -> float:
        """Fraction of the shared cells whose match is right; 0 if none is shared."""
        return int((self.right & self.shared).sum()) / max(1, int(self.shared.sum()))

    def line(self) -> str:
        """Format the figures in one line."""
        return (
            f"{self.share:.0%} of {int(self.shared.sum())} cells that both views show are matched "
            f"with the cell at their place ({self.chance:.0%} by chance)"
        )

    def as_dict(self) -> dict[str, float]:
        """Return the values for JSON."""
        return {"cells": int(self.shared.sum()), "right": self.share, "by_chance": self.chance}


@torch.no_grad()
def match_views(method: Method, batch: Batch) -> Matches | None:
    """Match the views of a batch; None for a method that matches no cells."""
    match = method.match(batch.to("cpu"))
    if match is None:
        return None
    rows, columns = match.shape[1:]
    near = nearby(batch.places[0], batch.places[1], rows, columns, NEAR)  # NxPxP
    shared = near.any(2)  # NxP
    right = near.gather(2, match.flatten(1)[:, :, None])[:, :, 0]
    chance = near.float().mean(2)[shared].mean().item() if shared.any() else 0.0
    return Matches(match, shared.view_as(match), right.view_as(match), chance)


def draw_matches(views: Sequence[Tensor], matches: Matches) -> np.ndarray:
    """Draw the two views of each image side by side, with lines between matched cells: green where
    the match is right. Of the cells that both views show, at most `SHOWN` are drawn."""
    pairs = [_pixels(view) for view in views]
    side = max(_SIDE, *(len(view[0]) for view in pairs))
    picture = sheet([[enlarged(a, side), enlarged(b, side)] for a, b in zip(*pairs, strict=True)])
    rows, columns = matches.match.shape[1:]
    drawn = side // len(pairs[0][0]) * len(pairs[0][0])  # pixels of a view in its cell of the sheet

    def centre(cell: int, image: int, column: int) -> tuple[int, int]:
        y, x = divmod(cell, columns)
        margin = (side - drawn) // 2
        left = column * (side + GAP) + margin + (x + 0.5) / columns * drawn
        return round(left), round(image * (side + GAP) + margin + (y + 0.5) / rows * drawn)

    for image, shared in enumerate(matches.shared.flatten(1)):
        cells = shared.nonzero().flatten().tolist()
        for cell in cells[:: max(1, -(-len(cells) // SHOWN))]:
            match = int(matches.match[image].flatten()[cell])
            colour = _RIGHT if matches.right[image].flatten()[cell] else _WRONG
            ends = centre(cell, image, 0), centre(match, image, 1)
            cv2.line(picture, *ends, colour, 1, cv2.LINE_AA)
            for end in ends:
                cv2.circle(picture, end, 3, colour, -1, cv2.LINE_AA)
    return picture


def draw_slots(view: Tensor, slots: Tensor) -> np.ndarray:
    """Draw each image's first view, and beside it the view tinted by the slot of each cell.

    Args:
        view: (N, 3, H, W) uint8.
        slots: (N, h, w) int64, the most similar slot of each cell.
    """
    found = slots.unique().tolist()
    palette = {slot: _hue(i / len(found)) for i, slot in enumerate(found)}
    rows = []
    for pixels, grid in zip(_pixels(view), slots.tolist(), strict=True):
        colours = np.array([[palette[slot] for slot in row] for row in grid], np.uint8)
        tint = cv2.resize(colours, pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        mixed = cv2.addWeighted(pixels, 0.5, tint, 0.5, 0)
        side = max(_SIDE, len(pixels))
        rows.append([enlarged(pixels, side), enlarged(mixed, side)])
    return sheet(rows)


def _pixels(view: Tensor) -> np.ndarray:
    """(N, 3, H, W) -> (N, H, W, 3)."""
    return np.ascontiguousarray(view.permute(0, 2, 3, 1).numpy())


def _hue(fraction: float) -> list[int]:
    return [round(255 * part) for part in colorsys.hsv_to_rgb(fraction, 0.9, 0.95)]

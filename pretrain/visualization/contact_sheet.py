"""Composition of a picture from cells (photographs, views, filters) on a white sheet."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

GAP = 4  # pixels between cells
_HEADING = 20  # height of a heading
_INK = (40, 40, 40)
_FONT, _SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.5


def cell(image: np.ndarray, side: int) -> np.ndarray:
    """Centre a uint8 (h, w, 3) image, h and w at most ``side``, in a white square with a gap to the
    right and below: (side + GAP, side + GAP, 3)."""
    sheet = np.full((side + GAP, side + GAP, 3), 255, np.uint8)
    height, width, _ = image.shape
    top, left = (side - height) // 2, (side - width) // 2
    sheet[top : top + height, left : left + width] = image
    return sheet


def fitted(image: np.ndarray, side: int) -> np.ndarray:
    """Place a photograph, uint8 (H, W, 3), in a cell, with its longer side resized to ``side``."""
    height, width, _ = image.shape
    scale = side / max(height, width)
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    return cell(cv2.resize(image, shape, interpolation=cv2.INTER_AREA), side)


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """Place a small image in a cell, enlarged by the largest whole factor that fits, so that its
    pixels stay visible."""
    factor = max(1, side // len(image))
    return cell(image.repeat(factor, axis=0).repeat(factor, axis=1), side)


def heading(text: str, side: int) -> np.ndarray:
    """Draw a line of text to be centred above a column of cells, smaller if it would not fit:
    (20, side + GAP, 3)."""
    line = np.full((_HEADING, side + GAP, 3), 255, np.uint8)
    (width, _), _ = cv2.getTextSize(text, _FONT, _SCALE, 1)
    place = max(0, side - width) // 2, _HEADING - 6
    scale = _SCALE * min(1.0, side / width)
    return cv2.putText(line, text, place, _FONT, scale, _INK, 1, cv2.LINE_AA)


def sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Join rows of cells to one picture; cells of a row have one height, cells of a column one
    width. Shorter rows end in white."""
    columns = max(map(len, rows))
    lines = [
        np.concatenate([*row, *[np.full_like(row[0], 255)] * (columns - len(row))], axis=1)
        for row in rows
    ]
    return np.concatenate(lines)[:-GAP, :-GAP]


def png(picture: np.ndarray) -> bytes:
    """Encode a uint8 (H, W, 3) RGB picture as PNG."""
    _, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return data.tobytes()

"""Objects of one image, annotated or detected."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Objects:
    """The objects of one image, annotated or detected.

    Attributes:
        boxes: (N, 4) float, x0 y0 x1 y1 in pixels.
        classes: (N,) int, indices of the class names.
        scores: (N,) in [0, 1], or None for annotations.
        masks: (N, H, W) bool, or None.
        ignored: (N,) bool, annotations that count neither as missed nor as wrong (crowds,
            difficult objects), or None.
    """

    boxes: NDArray[np.floating]
    classes: NDArray[np.integer]
    scores: NDArray[np.floating] | None = None
    masks: NDArray[np.bool_] | None = None
    ignored: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def areas(self) -> NDArray[np.floating]:
        """(N,) areas of the boxes in pixels."""
        return _areas(self.boxes)

    def scores_or_zero(self) -> NDArray[np.floating]:
        """(N,) scores, zero for annotations."""
        return np.zeros(len(self)) if self.scores is None else self.scores

    def ignored_or_none(self) -> NDArray[np.bool_]:
        """(N,) bool, False unless annotations are ignored."""
        return np.zeros(len(self), dtype=bool) if self.ignored is None else self.ignored

    def select(self, chosen: NDArray[Any]) -> "Objects":
        """Return the objects at the indices, or where a mask is true."""
        more = (p if p is None else p[chosen] for p in (self.scores, self.masks, self.ignored))
        return Objects(self.boxes[chosen], self.classes[chosen], *more)


def box_iou(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """Pairwise IoU of (N, 4) and (M, 4) boxes: (N, M)."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    union = _areas(a)[:, None] + _areas(b) - shared
    iou: NDArray[np.floating] = shared / np.maximum(union, 1e-9)
    return iou


def _areas(boxes: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.multiply(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])

"""The class of every pixel of an image."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNLABELLED = 255  # in label files, as in those of VOC and Cityscapes
MOST_CLASSES = 255


@dataclass
class LabelMap:
    """The class of each pixel of one image.

    Attributes:
        classes: (H, W) uint8, indices of the class names, or `UNLABELLED`.
        scores: (H, W) float32 in [0, 1], the probability of that class.
    """

    classes: NDArray[np.uint8]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.shares())

    def shares(self) -> dict[int, float]:
        """Class -> its share of the pixels in (0, 1], in decreasing order."""
        counts = np.bincount(self.classes.reshape(-1), minlength=UNLABELLED + 1)[:UNLABELLED]
        order = np.argsort(-counts, kind="stable")
        return {int(c): float(counts[c] / self.classes.size) for c in order if counts[c]}

"""Comparison of what two forms of one detector find in an image."""

from dataclasses import dataclass

import numpy as np

from moco_det.structures.objects import Objects

BOX, SCORE, IOU = 0.1, 1e-3, 0.99  # pixels; score; least IoU of two masks


@dataclass
class Agreement:
    """Agreement of two forms of a detector over several images.

    Attributes:
        objects: number of pairs of objects.
        box: largest difference of a coordinate, in pixels.
        score: largest difference of a score.
        iou: least IoU of two masks.
        faults: descriptions of objects that differ by more than `BOX`, `SCORE` or `IOU`.
    """

    objects: int = 0
    box: float = 0.0
    score: float = 0.0
    iou: float = 1.0
    faults: list[str] | None = None

    def add(self, expected: Objects, found: Objects, floor: float, most: int, image: str) -> None:
        """Compare the objects of one image, in whatever order.

        An object that either form may drop is not required of the other: one that scores `SCORE`
        or less above the threshold or, in an image that has as many objects as a detector returns,
        above the last one.

        Args:
            floor: threshold of the scores.
            most: largest number of objects of an image.
            image: description of the image, for the faults.
        """
        for objects in (expected, found):
            if len(objects) >= most:
                floor = max(floor, float(objects.scores_or_zero().min()))
        free = set(range(len(found)))
        for index, score in enumerate(expected.scores_or_zero().tolist()):
            same = [j for j in free if found.classes[j] == expected.classes[index]]
            apart = [float(np.abs(found.boxes[j] - expected.boxes[index]).max()) for j in same]
            if not apart or min(apart) > BOX:
                self._fault(score > floor + SCORE, f"an object of score {score:.3f} in {image}")
                continue
            match = same[int(np.argmin(apart))]
            free.remove(match)
            self._pair(expected, index, found, match, min(apart), image)
        for j in free:
            score = float(found.scores_or_zero()[j])
            self._fault(score > floor + SCORE, f"another object of score {score:.3f} in {image}")

    def _pair(
        self, expected: Objects, i: int, found: Objects, j: int, apart: float, image: str
    ) -> None:
        scores = expected.scores_or_zero()[i], found.scores_or_zero()[j]
        score, iou, pixels = abs(float(scores[0] - scores[1])), 1.0, 0
        if expected.masks is not None and found.masks is not None:
            a, b = expected.masks[i], found.masks[j]
            pixels = int((a != b).sum())
            iou = float((a & b).sum() / max((a | b).sum(), 1)) if pixels else 1.0
        self.objects += 1
        self.box, self.score = max(self.box, apart), max(self.score, score)
        self.iou = min(self.iou, iou)
        what = f"the object of score {scores[0]:.3f} in {image}"
        self._fault(score > SCORE, f"the score ({scores[1]:.4f}) of {what}")
        self._fault(iou <= IOU and pixels > 1, f"the mask (IoU {iou:.3f}) of {what}")

    def _fault(self, wrong: bool, what: str) -> None:
        if wrong:
            self.faults = [*(self.faults or []), what]

    def __str__(self) -> str:
        masks = f", masks IoU at least {self.iou:.4f}" if self.iou < 1 else ""
        return f"boxes within {self.box:.2g} px, scores within {self.score:.2g}{masks}"

"""Top-1, top-5 and per-class accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Accuracies in percent.

    Attributes:
        top1: share of the images whose first predicted class is correct.
        top5: share of the images whose class is among the first five predicted; None with five
            classes or fewer, where it would always be 100.
        per_class: top-1 accuracy of each class that has images.
    """

    top1: float
    top5: float | None
    per_class: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the accuracies as a dictionary for JSON, in percent."""
        return asdict(self)

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %" + (
            "" if self.top5 is None else f"  top-5 {self.top5:.2f} %"
        )


def accuracy(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> Accuracy:
    """Compute the accuracy of predictions.

    Args:
        predictions: (M, P) int64, classes in order of falling confidence; -1 is never correct.
        labels: (M,) int64.
        classes: names, in the order of the labels.
    """
    right = predictions == labels[:, None]  # MxP
    count = torch.bincount(labels, minlength=len(classes))
    hits = torch.bincount(labels[right[:, 0]], minlength=len(classes))
    return Accuracy(
        top1=100.0 * right[:, 0].double().mean().item(),
        top5=100.0 * right[:, :5].any(1).double().mean().item() if len(classes) > 5 else None,
        per_class={
            name: 100.0 * int(h) / int(n)
            for name, h, n in zip(classes, hits, count, strict=True)
            if n
        },
    )

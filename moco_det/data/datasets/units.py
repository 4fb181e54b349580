"""Boxes in other units than their format's, recognised over a whole data set."""

from __future__ import annotations

import numpy as np

from moco_common.errors import UserError
from moco_common.text import counted
from moco_det.data.datasets.findings import DatasetReport

# The share of boxes below which those that look normalised are single faults.
MOST = 0.5
# Boxes from which on a pattern that all of them show is no accident.
ENOUGH = 8


def refuse_normalised(boxes: np.ndarray, spec: str, unit: str) -> None:
    """Refuse a data set most of whose boxes lie between 0 and 1.

    Args:
        boxes: (N, 4), as the file holds them.
        unit: what the format asks for, for the message.

    Raises:
        UserError: they do.
    """
    count = int(((boxes >= 0) & (boxes <= 1)).all(axis=1).sum())
    if count > MOST * len(boxes):
        raise UserError(
            f"{spec}: {count:,} of {counted(len(boxes), 'box', ',')} lie between 0 and 1, so they "
            f"are normalised, but this format holds {unit}: multiply x and width by the width of "
            "the image, y and height by its height"
        )


def check_corners(
    boxes: np.ndarray, sizes: np.ndarray, spec: str, file: str, report: DatasetReport
) -> None:
    """Check that boxes are [x, y, width, height], not [x0, y0, x1, y1].

    The pattern is that many boxes reach beyond their images as the first, and that as the second
    all are boxes inside them.

    Args:
        boxes: (N, 4), as the file holds them.
        sizes: (N, 2), width and height of their images.

    Raises:
        UserError: the pattern is there in a data set of ``ENOUGH`` boxes; in a smaller one it is a
            finding.
    """
    corners = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + 1) & (boxes[:, :2] >= -1)
    beyond = int((boxes[:, :2] + boxes[:, 2:] > sizes + 1).any(axis=1).sum())
    if not len(boxes) or not corners.all() or 4 * beyond < len(boxes):
        return
    found = (
        f"{beyond:,} of {counted(len(boxes), 'box', ',')} reach beyond their images as [x, y, "
        "width, height], and all fit as corners [x0, y0, x1, y1]"
    )
    if len(boxes) >= ENOUGH:
        raise UserError(
            f"{spec}: {found}: the file holds corners; replace each by [x0, y0, x1 - x0, y1 - y0]"
        )
    report.add(f"boxes that seem to be corners: {found}", file, action="kept as they are")

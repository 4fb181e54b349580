"""Test images that cannot be read: the evaluation continues, and they count as having no detection.

One broken file must not cost the results of a finished training. It is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from moco_common.errors import UserError
from moco_common.text import counted
from moco_det.data.samplers import Mapper, map_or_explain

REASON = "unreadable"  # key under which an input without an image holds the cause
NAMED = 5  # images in the sentence


def map_or_leave_out(mapper: Mapper, record: dict[str, Any]) -> dict[str, Any]:
    """Return what a mapper makes of a record, or the record with the `REASON` that its image
    cannot be read."""
    found = map_or_explain(mapper, record)
    if not isinstance(found, UserError):
        return found
    facts = {key: value for key, value in record.items() if key != "annotations"}
    return {**facts, REASON: str(found).rstrip(".")}


class LeavingOutUnreadable(nn.Module):
    """A model for single images that predicts nothing for an input without an image.

    Args:
        model: a Detectron2 model.
        semantic: whether it labels pixels; it then outputs ``sem_seg`` None instead of empty
            ``instances``.
    """

    def __init__(self, model: nn.Module, *, semantic: bool) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # what Detectron2's inference restores
        self.semantic = semantic
        self.reasons: dict[str, str] = {}  # by file, for the images left out so far

    def forward(self, inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return one output for each input."""
        readable = [example for example in inputs if REASON not in example]
        outputs = iter(self.model(readable) if readable else ())
        return [self._nothing(x) if REASON in x else next(outputs) for x in inputs]

    def _nothing(self, example: Mapping[str, Any]) -> dict[str, Any]:
        self.reasons[example["file_name"]] = example[REASON]
        if self.semantic:
            return {"sem_seg": None}
        height, width = example["height"], example["width"]
        nothing = Instances((height, width))
        nothing.pred_boxes = Boxes(torch.zeros(0, 4))
        nothing.scores = torch.zeros(0)
        nothing.pred_classes = torch.zeros(0, dtype=torch.int64)
        nothing.pred_masks = torch.zeros(0, height, width, dtype=torch.bool)
        return {"instances": nothing}


def left_out(reasons: Mapping[str, str], total: int) -> str:
    """Return a sentence on the images that an evaluation left out; "" if there are none.

    Args:
        reasons: one per image, by file.
        total: number of test images.

    Raises:
        UserError: no image could be read.
    """
    if not reasons:
        return ""
    named = "; ".join(list(reasons.values())[:NAMED]) + ("; ..." if len(reasons) > NAMED else "")
    if len(reasons) >= total:
        raise UserError(f"no test image can be read ({named}): check the data and evaluate again.")
    return (
        f"{len(reasons):,} of {counted(total, 'test image', ',')} could not be read and count as "
        f"images in which nothing was found: {named}"
    )

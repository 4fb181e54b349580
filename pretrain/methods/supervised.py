"""Supervised pre-training, with which the MoCo paper compares (He et al. 2020, Section 4.2): a
linear classifier of the class folders, on the views, encoder, optimiser and exports of the other
methods."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor

from moco_common import comm
from moco_common.errors import UserError
from pretrain.data.source_base import SPLITS, Source
from pretrain.methods.base import Method, Run
from pretrain.methods.components import embedding_spread, encoder_builder, unit
from pretrain.modeling.heads import linear_head
from pretrain.modeling.resnet import ResNet

KEYS = {
    "SUPERVISED.CLASSES": (
        0,
        "Number of classes. 0, the default, counts the class folders of DATA.",
    ),
}


class Supervised(Method):
    """An encoder and a linear classifier.

    Args:
        encoder: its output is (N, classes).
        classes: number of classes.
        labels: (num_images,) int64, class of each image; None to build the method without training
            it.
    """

    view_names = ("view",)
    labels: Tensor | None

    def __init__(self, encoder: ResNet, *, classes: int, labels: Tensor | None = None) -> None:
        super().__init__()
        self.encoder_q, self.classes = encoder, classes
        self.register_buffer("labels", labels, persistent=False)  # those of DATA, not of the run

    @classmethod
    def complete(cls, cfg: CfgNode, source: Source) -> None:
        """Count the class folders."""
        if source.labels is None or (source.labels < 0).any():
            without = 0 if source.labels is None else int((source.labels < 0).argmax())
            raise UserError(
                f"METHOD supervised needs the class of every image, but {source.name(without)} is "
                f"in no class folder: pass --data a folder with one folder of images per class."
            )
        if set(source.classes) <= SPLITS:
            raise UserError(
                f"--data contains the folders {', '.join(source.classes)}, which look like splits, "
                f"not like classes: pass one split, such as {source.classes[0]}."
            )
        found = len(source.classes)
        if found < 2 or cfg.SUPERVISED.CLASSES not in (0, found):
            raise UserError(
                f"--data has {found} class folders, but METHOD supervised needs two or more, and "
                f"SUPERVISED.CLASSES is {cfg.SUPERVISED.CLASSES}: pass other data, or leave "
                f"SUPERVISED.CLASSES at 0."
            )
        cfg.SUPERVISED.CLASSES = found

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> Supervised:
        """Build the classifier from ``SUPERVISED``."""
        classes = cfg.SUPERVISED.CLASSES
        encoder = encoder_builder(cfg, run, linear_head(classes))()
        return cls(encoder, classes=classes, labels=run.labels)

    @property
    def chance_loss(self) -> float:
        """log(C): all classes look alike."""
        return math.log(max(1, self.classes))

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Classify the images; ``top1`` is the fraction of correct ones among these views."""
        assert self.labels is not None
        logits = self.encoder_q(views[0])  # NxC
        labels = self.labels[comm.to_device(index, logits.device)]  # N
        return {
            "loss": F.cross_entropy(logits, labels),
            "top1": (logits.argmax(1) == labels).float().mean(),
            "spread": embedding_spread(unit(logits.detach())),
        }

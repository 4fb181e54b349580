"""kNN accuracy of the encoder while it is being trained."""

from __future__ import annotations

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from moco_common import comm
from moco_common.errors import UserError
from pretrain import distributed
from pretrain.modeling.resnet import ResNet
from pretrain.probe.backbone import backbone_of, build_backbone
from pretrain.probe.datasets import LabelledImages, Preprocessing, open_train_and_test, splits_of
from pretrain.probe.defaults import TEMPERATURE, K
from pretrain.probe.features import stream_features
from pretrain.probe.knn import merge, nearest, vote


class OnlineKNN:
    """Classifies test images by their nearest training images, every so many epochs.

    Works on a copy of the encoder: no parameter, BN statistic, gradient or random generator of
    the run is touched, and the run ends in the very same weights as one without it.

    Args:
        train, test: labelled images under one numbering of the classes.
        preprocessing: of both.
        period: steps between evaluations, perhaps not whole; 0 for the last step only.
        total_steps: length of the run.
        batch_size: images a rank passes through the encoder at once.
    """

    def __init__(
        self,
        train: LabelledImages,
        test: LabelledImages,
        preprocessing: Preprocessing,
        *,
        period: float,
        total_steps: int,
        batch_size: int = 128,
        threads: int = 1,
    ) -> None:
        self.train, self.test, self.preprocessing = train, test, preprocessing
        self.period, self.total_steps = period, total_steps
        self.batch_size, self.threads = batch_size, threads

    def due(self, step: int) -> bool:
        """Whether to evaluate after ``step`` steps: the same on every rank, and after a resume."""
        if step <= 0 or step > self.total_steps:
            return False
        if step == self.total_steps:
            return True
        return self.period > 0 and step // self.period > (step - 1) // self.period

    def evaluate(self, method: nn.Module) -> dict[str, float]:
        """``knn_top1`` in percent, the same on every rank. All ranks must call: they share the
        images, and the BN statistics are the mean over the ranks, as in a checkpoint.

        Args:
            method: has an ``encoder_q``, whose backbone is evaluated.
        """
        backbone = self._copy(method)
        bank, bank_labels = self._features(backbone, self.train)  # of this rank's share
        mine, mine_labels = self._features(backbone, self.test)
        device = comm.device()
        tests = comm.all_gather(mine.to(device))
        truth = comm.all_gather(mine_labels.to(device))
        right = torch.zeros((), device=device)
        for queries, labels in zip(tests.split(1024), truth.split(1024), strict=True):
            # Every rank finds the neighbours in its share of the bank, then they are merged.
            similarity, found = nearest(bank, bank_labels, queries, K)
            similarity, found = merge(_side_by_side(similarity), _side_by_side(found), K)
            named = vote(similarity, found, len(self.train.classes), TEMPERATURE, top=1)
            right += (named[:, 0] == labels).sum()  # padding is labelled -1, which nobody names
        return {"knn_top1": 100.0 * right.item() / max(1, int((truth >= 0).sum()))}

    @staticmethod
    def _copy(method: nn.Module) -> ResNet:
        encoder = method.encoder_q
        assert isinstance(encoder, nn.Module)
        tensors = {name: x.detach().clone() for name, x in encoder.state_dict().items()}
        backbone = build_backbone(backbone_of(tensors)).to(memory_format=torch.channels_last)
        distributed.average_batch_norm(backbone)
        return backbone

    def _features(self, backbone: ResNet, images: LabelledImages) -> tuple[Tensor, Tensor]:
        """Features and labels of this rank's images, as many rows on every rank; padding, and what
        could not be read, is labelled -1."""
        world, rank = comm.world_size(), comm.rank()
        share = -(-len(images) // world)
        rows = np.arange(rank, len(images), world)
        features = torch.zeros(share, backbone.num_features)
        labels = torch.full((share,), -1)
        for read, values, _ in stream_features(
            backbone,
            images,
            self.preprocessing,
            batch_size=self.batch_size,
            threads=self.threads,
            rows=rows,
        ):
            at = torch.from_numpy(read // world)
            features[at] = values
            labels[at] = torch.from_numpy(images.labels[read])
        return features, labels


def _side_by_side(x: Tensor) -> Tensor:
    """(Q, K) of each of W ranks -> (Q, W*K) on every rank."""
    return torch.cat(comm.all_gather(x).chunk(comm.world_size()), dim=1)


def build_online_knn(cfg: CfgNode, *, num_images: int, total_steps: int) -> OnlineKNN | None:
    """What ``PROBE`` asks for; None if it names no data.

    Args:
        num_images: images of the pre-training source, which make an epoch.

    Raises:
        UserError: ``PROBE.DATA`` holds no classes, or the period is negative.
    """
    if not cfg.PROBE.DATA:
        return None
    if cfg.PROBE.PERIOD_EPOCHS < 0:
        raise UserError(f"PROBE.PERIOD_EPOCHS is {cfg.PROBE.PERIOD_EPOCHS}: it cannot be negative.")
    folder, tested = splits_of(cfg.PROBE.DATA)
    train, test = open_train_and_test(folder, tested)  # the same split for every SEED
    return OnlineKNN(
        train,
        test,
        Preprocessing.of(cfg.INPUT.CROP_SIZE),
        period=cfg.PROBE.PERIOD_EPOCHS * num_images / cfg.SOLVER.BATCH_SIZE,
        total_steps=total_steps,
        threads=max(1, cfg.DATALOADER.NUM_WORKERS),
    )

"""kNN accuracy of the encoder during pre-training."""

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
    """Periodic kNN classification of test images by labelled training images.

    Works on a copy of the encoder. No parameter, BN statistic, gradient or random generator of the
    run is touched: the run ends with exactly the same weights as without it.

    Args:
        train, test: labelled images with a common numbering of the classes.
        preprocessing: preprocessing of both.
        period: number of steps between evaluations, possibly fractional; 0 for the last step only.
        total_steps: length of the run.
        batch_size: number of images per rank and forward pass.
        threads: number of decoding threads.
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
        """Return True if an evaluation follows step ``step``, on every rank, resumed or not."""
        if step <= 0 or step > self.total_steps:
            return False
        if step == self.total_steps:
            return True
        return self.period > 0 and step // self.period > (step - 1) // self.period

    def evaluate(self, method: nn.Module) -> dict[str, float]:
        """Return ``knn_top1`` in percent, the same on every rank.

        All ranks must call this: they divide the images among themselves, and the BN statistics are
        averaged over the ranks, as in a checkpoint.

        Args:
            method: has an ``encoder_q``, whose backbone is evaluated.
        """
        backbone = self._copy(method)
        bank, bank_labels = self._features(backbone, self.train)  # this rank's share
        mine, mine_labels = self._features(backbone, self.test)
        device = comm.device()
        tests = comm.all_gather(mine.to(device))
        truth = comm.all_gather(mine_labels.to(device))
        right = torch.zeros((), device=device)
        for queries, labels in zip(tests.split(1024), truth.split(1024), strict=True):
            # Every rank finds the neighbours in its share of the bank; these are then merged.
            similarity, found = nearest(bank, bank_labels, queries, K)
            similarity, found = merge(_side_by_side(similarity), _side_by_side(found), K)
            named = vote(similarity, found, len(self.train.classes), TEMPERATURE, top=1)
            right += (named[:, 0] == labels).sum()  # padding is -1, which is never predicted
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
        """Return the features and labels of this rank's images, with the same shape on every rank.

        Padding and unreadable images are labelled -1.
        """
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
    """Concatenate the (Q, K) tensors of W ranks to (Q, W*K), on every rank."""
    return torch.cat(comm.all_gather(x).chunk(comm.world_size()), dim=1)


def build_online_knn(cfg: CfgNode, *, num_images: int, total_steps: int) -> OnlineKNN | None:
    """Build the kNN evaluation from the keys of ``PROBE``; None if they name no data.

    Args:
        num_images: number of images in an epoch of pre-training.

    Raises:
        UserError: ``PROBE.DATA`` has no class folders, or the period is negative.
    """
    if not cfg.PROBE.DATA:
        return None
    if cfg.PROBE.PERIOD_EPOCHS < 0:
        raise UserError(f"PROBE.PERIOD_EPOCHS is {cfg.PROBE.PERIOD_EPOCHS}: set it to 0 or more.")
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

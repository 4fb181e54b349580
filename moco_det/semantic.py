"""Semantic segmentation as the paper does it: the FCN head and the training images.

He et al. 2020, "Momentum Contrast", appendix on semantic segmentation; Long et al. 2015, "Fully
Convolutional Networks for Semantic Segmentation". Importing this module registers the head.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn.weight_init import c2_msra_fill
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from moco_det.errors import UserError


@SEM_SEG_HEADS_REGISTRY.register()
class FCNHead(nn.Module):
    """Dilated 3x3 convolutions with normalisation and ReLU, then a 1x1 classifier.

    Args:
        input_shape: of the one feature that the head sees.
        num_classes: classes, without the ignored value.
        channels: of each convolution.
        num_conv: how many there are before the classifier.
        dilation: of each of them.
        norm: of each, as ``detectron2.layers.get_norm`` takes it.
        ignore_value: label that is not trained on.
        loss_weight: factor of the loss.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        channels: int,
        num_conv: int,
        dilation: int,
        norm: str,
        ignore_value: int = 255,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.stride = input_shape.stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        convs = []
        width = input_shape.channels
        for _ in range(num_conv):
            conv = Conv2d(
                width,
                channels,
                kernel_size=3,
                padding=dilation,
                dilation=dilation,
                bias=not norm,
                norm=get_norm(norm, channels),
                activation=nn.ReLU(),
            )
            c2_msra_fill(conv)
            convs.append(conv)
            width = channels
        self.convs = nn.Sequential(*convs)
        self.predictor = nn.Conv2d(width, num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        assert self.predictor.bias is not None
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """The head of ``MODEL.SEM_SEG_HEAD``, on its one input feature."""
        head = cfg.MODEL.SEM_SEG_HEAD
        (feature,) = head.IN_FEATURES
        return {
            "input_shape": input_shape[feature],
            "num_classes": head.NUM_CLASSES,
            "channels": head.CONVS_DIM,
            "num_conv": head.NUM_CONV,
            "dilation": head.DILATION,
            "norm": head.NORM,
            "ignore_value": head.IGNORE_VALUE,
            "loss_weight": head.LOSS_WEIGHT,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Logits, or the loss while training.

        Args:
            features: one feature (N, C, h, w).
            targets: (N, H, W) int64 labels at the image's size, in [0, num_classes) or
                ``ignore_value``; needed while training.

        Returns:
            ``(None, {"loss_sem_seg": scalar})`` while training; else ``(logits, {})`` with logits
            (N, num_classes, h * stride, w * stride), which cover the image and may exceed it.
        """
        (x,) = features.values()
        logits = upsample_aligned(self.predictor(self.convs(x)).float(), self.stride)
        if not self.training:
            return logits, {}
        assert targets is not None
        height, width = targets.shape[-2:]
        loss = F.cross_entropy(
            logits[:, :, :height, :width], targets, ignore_index=self.ignore_value, reduction="sum"
        )
        counted = (targets != self.ignore_value).sum().clamp(min=1)  # a crop may hold none
        return None, {"loss_sem_seg": self.loss_weight * loss / counted}


def upsample_aligned(x: Tensor, stride: int) -> Tensor:
    """Bilinear upsampling that leaves each value at the pixel where its convolutions are centred.

    Strided convolutions with symmetric padding put value ``i`` at pixel ``i * stride``. Between
    them the result is linear, behind the last one constant.

    Shape:
        (N, C, h, w) -> (N, C, h * stride, w * stride)
    """
    height, width = ((size - 1) * stride + 1 for size in x.shape[-2:])
    x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)
    return F.pad(x, (0, stride - 1, 0, stride - 1), mode="replicate")


def read_labels(path: str | Path) -> np.ndarray:
    """(H, W) labels of a PNG: grey values, or the indices of a palette (as VOC's own files have).

    Raises:
        UserError: the file cannot be read, or holds colours instead of labels.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "I", "I;16"):
                raise UserError(
                    f"{path} is a picture of mode {image.mode}, not labels: write one grey value "
                    "or palette index a pixel."
                )
            return np.array(image, dtype=np.int64)
    except OSError as error:
        raise UserError(f"cannot read the labels {path}: {error}.") from error


class RandomScale(T.Augmentation):
    """Resize by a factor drawn from [smallest, largest]; labels by their nearest neighbour."""

    def __init__(self, smallest: float, largest: float) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The transform of an (H, W, C) image."""
        height, width = image.shape[:2]
        scale = np.random.uniform(self.smallest, self.largest)
        return T.ResizeTransform(
            height, width, max(round(height * scale), 1), max(round(width * scale), 1)
        )


class SemanticMapper:
    """One record of a data set -> a training example.

    Detectron2's ``DatasetMapper`` would read a palette's colours as labels.

    Args:
        augmentations: of image and labels together.
        image_format: "RGB" or "BGR".
    """

    def __init__(self, augmentations: list[T.Augmentation], image_format: str) -> None:
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "SemanticMapper":
        """Scale by ``INPUT.SCALE_TRAIN``, crop to ``INPUT.CROP.SIZE``, flip.

        What is smaller than the crop is padded where the batch is put together, behind
        normalisation: with the mean colour, and with labels that are ignored.
        """
        smallest, largest = cfg.INPUT.SCALE_TRAIN
        augmentations: list[T.Augmentation] = [
            RandomScale(smallest, largest),
            T.FixedSizeCrop(tuple(map(int, cfg.INPUT.CROP.SIZE)), pad=False),
        ]
        if cfg.INPUT.RANDOM_FLIP != "none":
            vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
            augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
        return cls(augmentations, cfg.INPUT.FORMAT)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """``image`` (3, H, W) uint8 and ``sem_seg`` (H, W) int64 beside the record's own keys."""
        image = detection_utils.read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(record, image)
        labels = read_labels(record["sem_seg_file_name"])
        example = T.AugInput(image, sem_seg=labels.astype(np.uint8))
        self.augmentations(example)
        pixels = np.ascontiguousarray(example.image.transpose(2, 0, 1))
        return {
            **record,
            "image": torch.as_tensor(pixels),
            "sem_seg": torch.as_tensor(example.sem_seg.astype(np.int64)),
        }

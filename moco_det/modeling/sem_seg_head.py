"""A fully convolutional head for semantic segmentation."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torch.nn import functional as F


@SEM_SEG_HEADS_REGISTRY.register()
class FCNHead(nn.Module):
    """Dilated 3x3 convolutions with normalisation and ReLU, then a 1x1 classifier.

    Args:
        input_shape: channels and stride of the single input feature.
        num_classes: number of classes, without the ignored label.
        channels: number of output channels of each 3x3 convolution.
        num_conv: number of 3x3 convolutions.
        dilation: dilation of each 3x3 convolution.
        norm: normalisation after each, in the notation of ``detectron2.layers.get_norm``.
        ignore_value: label of pixels excluded from the loss.
        loss_weight: factor applied to the loss.
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
        """Return the arguments of the head from ``MODEL.SEM_SEG_HEAD``."""
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
        """Compute the logits, or the loss in training mode.

        Args:
            features: a single feature (N, C, h, w).
            targets: (N, H, W) int64 labels at the size of the image, in [0, num_classes) or
                ``ignore_value``; required in training mode.

        Returns:
            ``(None, {"loss_sem_seg": scalar})`` in training mode; otherwise ``(logits, {})`` with
            logits (N, num_classes, h * stride, w * stride), which may exceed the image.
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
        counted = (targets != self.ignore_value).sum().clamp(min=1)  # a crop may have no label
        return None, {"loss_sem_seg": self.loss_weight * loss / counted}


def upsample_aligned(x: Tensor, stride: int) -> Tensor:
    """Upsample bilinearly, placing each value at the centre of its receptive field.

    Strided convolutions with symmetric padding place value ``i`` at pixel ``i * stride``. The
    result is linear between these pixels and constant after the last one.

    Shape:
        (N, C, h, w) -> (N, C, h * stride, w * stride)
    """
    height, width = ((size - 1) * stride + 1 for size in x.shape[-2:])
    x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)
    return F.pad(x, (0, stride - 1, 0, stride - 1), mode="replicate")

"""The dilated C5 backbone. Importing this module registers it."""

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone, build_resnet_backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn


class DilatedC5(Backbone):
    """A ResNet up to res5, followed by a 3x3 convolution to fewer channels, a norm and ReLU.

    This is MoCo's R50-dilated-C5 (He et al. 2020, appendix on the detection backbone): res5 has
    dilation 2 and stride 1, so the output has stride 16. Detectron2's DC5 lacks the extra
    convolution: its heads receive the 2,048 channels of res5.

    Args:
        bottom_up: backbone with the single output feature ``res5``.
        channels: number of channels of ``dc5``, the only output feature.
        norm: normalisation after the convolution, in the notation of
            ``detectron2.layers.get_norm``.
    """

    def __init__(self, bottom_up: Backbone, channels: int, norm: str) -> None:
        super().__init__()
        res5 = bottom_up.output_shape()["res5"]
        self.bottom_up = bottom_up
        self.conv = Conv2d(
            res5.channels,
            channels,
            kernel_size=3,
            padding=1,
            bias=not norm,
            norm=get_norm(norm, channels),
            activation=nn.ReLU(),
        )
        c2_msra_fill(self.conv)
        self.shape = ShapeSpec(channels=channels, stride=res5.stride)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``{"dc5": (N, channels, H / 16, W / 16)}`` for float images (N, 3, H, W)."""
        return {"dc5": self.conv(self.bottom_up(images)["res5"])}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the channels and the stride of ``dc5``."""
        return {"dc5": self.shape}


@BACKBONE_REGISTRY.register()
def build_resnet_dc5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DilatedC5:
    """Build :class:`DilatedC5` from ``MODEL.RESNETS`` and ``MODEL.DC5_CHANNELS``."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return DilatedC5(bottom_up, cfg.MODEL.DC5_CHANNELS, cfg.MODEL.RESNETS.NORM)

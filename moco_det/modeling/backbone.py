"""The dilated C5 backbone. Importing this module registers it by name."""

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone, build_resnet_backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn


class DilatedC5(Backbone):
    """A ResNet's res5, then one 3x3 convolution with normalisation and ReLU to fewer channels.

    MoCo's R50-dilated-C5 (He et al. 2020, appendix on the detection backbone): res5 has dilation 2
    and stride 1, so that everything happens at stride 16. Detectron2's DC5 has no such convolution;
    its heads see res5's 2,048 channels.

    Args:
        bottom_up: a backbone with the one feature ``res5``.
        channels: of the feature ``dc5``, this backbone's only one.
        norm: of the convolution, as ``detectron2.layers.get_norm`` takes it.
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
        """``images`` (N, 3, H, W) float -> ``{"dc5": (N, channels, H / 16, W / 16)}``."""
        return {"dc5": self.conv(self.bottom_up(images)["res5"])}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of ``dc5``."""
        return {"dc5": self.shape}


@BACKBONE_REGISTRY.register()
def build_resnet_dc5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DilatedC5:
    """:class:`DilatedC5` of ``MODEL.RESNETS`` with ``MODEL.DC5_CHANNELS``."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return DilatedC5(bottom_up, cfg.MODEL.DC5_CHANNELS, cfg.MODEL.RESNETS.NORM)

"""ROI heads that Detectron2 lacks. Importing this module registers them."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn

from moco_common.backbone.resnet import BLOCKS_PER_STAGE, has_bottlenecks


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsAnyDepth(Res5ROIHeads):
    """Detectron2's C4 head, with a res5 that also matches ResNet-18 and ResNet-34.

    Detectron2's own res5 always consists of three Bottlenecks. The weights of a ResNet-18 or -34,
    whose res5 consists of two or three BasicBlocks, do not fit it, and starting from a random res5
    costs about 7 AP.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the arguments of ``Res5ROIHeads``, with the res5 of ``MODEL.RESNETS.DEPTH``."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        resnet = cfg.MODEL.RESNETS
        if not has_bottlenecks(resnet.DEPTH):
            blocks = BLOCKS_PER_STAGE[resnet.DEPTH][-1]
            channels = res5_channels(cfg)
            stage = ResNet.make_stage(
                BasicBlock,
                blocks,
                stride_per_block=[2] + [1] * (blocks - 1),
                in_channels=channels // 2,
                out_channels=channels,
                norm=resnet.NORM,
            )
            arguments["res5"] = nn.Sequential(*stage)
        return arguments


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeadsAnyDepth):
    """MoCo's C4 box (and mask) head: res5, followed by an extra normalisation layer.

    The extra norm adjusts the scale of self-supervised features, which differs from that of an
    ImageNet classifier (He et al. 2019, "Momentum Contrast", appendix A.1). Its type is
    ``MODEL.RESNETS.NORM`` and its name in the state dict ``roi_heads.res5.norm``; both the box and
    the mask branch receive its output.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the arguments of ``Res5ROIHeads``, with a normalisation layer after res5."""
        arguments = super().from_config(cfg, input_shape)
        norm = get_norm(cfg.MODEL.RESNETS.NORM, res5_channels(cfg))
        if norm is not None:
            arguments["res5"].add_module("norm", norm)
        return arguments


def res5_channels(cfg: CfgNode) -> int:
    """Return the number of output channels of res5; res3, res4 and res5 each double it."""
    return int(cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8)

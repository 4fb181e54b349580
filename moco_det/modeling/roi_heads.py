"""Region heads that Detectron2 lacks. Importing this module registers them by name."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn

BASIC_BLOCKS = {18: 2, 34: 3}  # depth -> BasicBlocks of res5


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsAnyDepth(Res5ROIHeads):
    """Detectron2's C4 head, whose res5 also fits ResNet-18 and -34.

    Detectron2's own res5 is always three Bottlenecks. Weights of a ResNet-18 or -34, whose res5
    is two or three BasicBlocks, cannot fill it, and the detector loses some 7 AP to a random res5.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments of ``Res5ROIHeads``, with the res5 of ``MODEL.RESNETS.DEPTH``."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        resnet = cfg.MODEL.RESNETS
        if resnet.DEPTH in BASIC_BLOCKS:
            blocks = BASIC_BLOCKS[resnet.DEPTH]
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
    """The C4 box (and mask) head of MoCo: res5, then one more normalisation layer.

    An ImageNet classifier's res5 ends in features whose scale its last BN has set for it; trained
    from self-supervised weights the head needs that scale adjusted, hence a BN of its own (He et
    al. 2019, "Momentum Contrast", appendix A.1). The layer is ``roi_heads.res5.norm`` in the state
    dict, of ``MODEL.RESNETS.NORM``, and both the box and the mask branch see its output.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments of ``Res5ROIHeads``, with res5 ended by a normalisation layer."""
        arguments = super().from_config(cfg, input_shape)
        norm = get_norm(cfg.MODEL.RESNETS.NORM, res5_channels(cfg))
        if norm is not None:
            arguments["res5"].add_module("norm", norm)
        return arguments


def res5_channels(cfg: CfgNode) -> int:
    """Channels that res5 puts out: res3, res4 and res5 each double them."""
    return int(cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8)

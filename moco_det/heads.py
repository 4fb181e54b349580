"""Region heads that Detectron2 lacks. Importing this module registers them by name."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """The C4 box (and mask) head of MoCo: res5, then one more normalisation layer.

    An ImageNet classifier's res5 ends in features whose scale its last BN has set for it; trained
    from self-supervised weights the head needs that scale adjusted, hence a BN of its own (He et
    al. 2019, "Momentum Contrast", appendix A.1). The layer is ``roi_heads.res5.norm`` in the state
    dict, of ``MODEL.RESNETS.NORM``, and both the box and the mask branch see its output.

    For ResNet-18 and -34 res5 is made of BasicBlocks. Detectron2's own head is always three
    Bottlenecks, which such weights do not fit.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments of ``Res5ROIHeads``, with res5 ended by a normalisation layer."""
        arguments = super().from_config(cfg, input_shape)
        resnet = cfg.MODEL.RESNETS
        channels = resnet.RES2_OUT_CHANNELS * 8  # res3, res4 and res5 double the width
        if resnet.DEPTH in (18, 34):
            blocks = 2 if resnet.DEPTH == 18 else 3
            arguments["res5"] = nn.Sequential(
                *ResNet.make_stage(
                    BasicBlock,
                    blocks,
                    stride_per_block=[2] + [1] * (blocks - 1),
                    in_channels=channels // 2,
                    out_channels=channels,
                    norm=resnet.NORM,
                )
            )
        norm = get_norm(resnet.NORM, channels)
        if norm is not None:
            arguments["res5"].add_module("norm", norm)
        return arguments

"""The C4 heads and the dilated C5, against Detectron2's own parts and torchvision's ResNets."""

import subprocess
import sys

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch.nn import functional as F

from moco_det.config.protocols import load_config
from moco_det.modeling.backbone import build_resnet_dc5_backbone
from moco_det.modeling.roi_heads import Res5ROIHeadsAnyDepth, Res5ROIHeadsExtraNorm
from tests.conftest import NARROW


def build(head, *overrides):
    cfg = load_config("VOC", [*NARROW, "MODEL.RESNETS.NORM", "BN", *overrides])
    channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 4
    return head(cfg, {"res4": ShapeSpec(channels=channels, stride=16)}), cfg


def test_importing_the_package_puts_the_head_into_the_registry():
    code = (
        "import moco_det; from detectron2.modeling import ROI_HEADS_REGISTRY as R;"
        "print(R.get('Res5ROIHeadsExtraNorm').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "Res5ROIHeadsExtraNorm"
    assert "Warning" not in done.stderr


def test_the_head_is_detectron2s_and_one_norm_more():
    ours, theirs = (
        set(build(head)[0].state_dict()) for head in (Res5ROIHeadsExtraNorm, Res5ROIHeads)
    )
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert ours - theirs == {f"res5.norm.{leaf}" for leaf in leaves}
    assert theirs <= ours
    assert list(build(Res5ROIHeadsExtraNorm)[0].res5.named_children())[-1][0] == "norm"
    assert ROI_HEADS_REGISTRY.get("Res5ROIHeadsExtraNorm") is Res5ROIHeadsExtraNorm


def test_no_private_method_of_detectron2_is_overridden():
    own = [name for name in vars(Res5ROIHeadsExtraNorm) if not name.startswith("__")]
    assert [name for name in own if name.startswith("_") and not name.startswith("_abc")] == []


def test_box_and_mask_branches_see_res5_after_the_extra_norm():
    """Oracle: the branches' inputs, computed by hand from Detectron2's pooler and blocks."""
    torch.manual_seed(0)
    heads, _ = build(Res5ROIHeadsExtraNorm, "MODEL.MASK_ON", "True")
    heads.eval()
    norm = heads.res5.norm
    norm.running_mean.fill_(0.3)
    norm.weight.data.fill_(2.0)
    features = {"res4": torch.randn(1, 64, 6, 6)}
    boxes = Boxes(torch.tensor([[0.0, 0.0, 60.0, 60.0], [10.0, 10.0, 90.0, 80.0]]))
    x = heads.pooler([features["res4"]], [boxes])
    for block in list(heads.res5.children())[:-1]:
        x = block(x)
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    seen = {}
    heads.box_predictor.register_forward_pre_hook(lambda _, args: seen.update(box=args[0]))
    heads.mask_head.deconv.register_forward_pre_hook(lambda _, args: seen.update(mask=args[0]))
    proposal = Instances((96, 96), proposal_boxes=boxes, objectness_logits=torch.zeros(2))
    given = Instances((96, 96), pred_boxes=boxes, pred_classes=torch.zeros(2, dtype=torch.long))
    with torch.no_grad():
        heads(ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)]), features, [proposal])
        heads.forward_with_given_boxes(features, [given])
    torch.testing.assert_close(seen["box"], x.mean(dim=(2, 3)))
    torch.testing.assert_close(seen["mask"], x)


@pytest.mark.parametrize("head", [Res5ROIHeadsExtraNorm, Res5ROIHeadsAnyDepth])
@pytest.mark.parametrize(("depth", "blocks"), [(18, 2), (34, 3)])
def test_res5_of_a_shallow_resnet_is_made_of_basic_blocks(depth, blocks, head):
    """torchvision's layer4 is the oracle for names and shapes."""
    import torchvision

    overrides = [
        *("MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.RESNETS.WIDTH_PER_GROUP", "64"),
    ]
    heads, _ = build(head, *overrides)
    layer4 = getattr(torchvision.models, f"resnet{depth}")().layer4
    shapes = {}
    for name, tensor in layer4.state_dict().items():
        name = name.replace("bn1", "conv1.norm").replace("bn2", "conv2.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        shapes[name] = tensor.shape
    found = {k: v.shape for k, v in heads.res5.state_dict().items() if not k.startswith("norm.")}
    assert found == shapes
    assert len(layer4) == blocks
    x = torch.randn(2, 256, 14, 14)
    assert heads.res5(x).shape == (2, 512, 7, 7)


def test_without_the_extra_norm_the_head_of_a_deep_resnet_is_detectron2s():
    ours, theirs = (build(head)[0].state_dict() for head in (Res5ROIHeadsAnyDepth, Res5ROIHeads))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert ROI_HEADS_REGISTRY.get("Res5ROIHeadsAnyDepth") is Res5ROIHeadsAnyDepth


def test_dilated_c5_is_res5_at_stride_16_then_a_normalised_convolution():
    """Oracle: Detectron2's own dilated ResNet, and the convolution written out."""
    torch.manual_seed(0)
    overrides = [*NARROW, "MODEL.RESNETS.NORM", "BN", "MODEL.DC5_CHANNELS", "6"]
    cfg = load_config("VOC-DC5", overrides)
    neck = build_resnet_dc5_backbone(cfg, ShapeSpec(channels=3)).eval()
    norm = neck.conv.norm
    norm.running_mean.fill_(0.2)
    norm.bias.data.fill_(0.1)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        (found,) = neck(images).values()
        res5 = neck.bottom_up(images)["res5"]
        x = F.conv2d(res5, neck.conv.weight, padding=1)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        x = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + 0.1
    torch.testing.assert_close(found, x.clamp(min=0))
    assert res5.shape == (2, 128, 4, 6)
    assert neck.output_shape() == {"dc5": ShapeSpec(channels=6, stride=16)}
    assert {block.conv2.dilation for block in neck.bottom_up.res5} == {(2, 2)}


def test_without_a_norm_the_head_is_detectron2s():
    heads, _ = build(Res5ROIHeadsExtraNorm, "MODEL.RESNETS.NORM", "")
    assert not hasattr(heads.res5, "norm")

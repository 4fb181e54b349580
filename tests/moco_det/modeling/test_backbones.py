"""Every ResNet in every protocol's network: each backbone tensor comes from the weights file.

Built on torch's meta device, which has shapes but no values, so that a ResNet-152 costs nothing;
torchvision's ResNets are the oracle for what a file holds. (That a file's settings are read from
its tensors is tested with the weights.)
"""

import re

import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from moco_common.errors import UserError
from moco_det.checkpoint.backbone_weights import BackboneWeights, apply_settings, load_backbone
from moco_det.config.protocols import load_config
from moco_det.engine.setup import Options, prepare
from moco_det.modeling.detector import fit_norms

RESNETS = {
    "resnet18": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64},
    "resnet34": {"DEPTH": 34, "RES2_OUT_CHANNELS": 64},
    "resnet50": {"DEPTH": 50},
    "resnet101": {"DEPTH": 101},
    "resnet152": {"DEPTH": 152},
    "resnext50_32x4d": {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4},
    "wide_resnet50_2": {"WIDTH_PER_GROUP": 128},
}
NETWORKS = {
    "VOC": [],
    "VOC without the extra norm": ["MODEL.ROI_HEADS.NAME", "Res5ROIHeadsAnyDepth"],
    "COCO-FPN-1x": [],
    "VOC-DC5": [],
    "VOC-semseg": [],
}


def backbone_file(name):
    """torchvision's tensors under Detectron2's names, written down independently."""
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    tensors = {}
    for key, tensor in state.items():
        if key.startswith("fc."):
            continue
        key = re.sub(r"^layer(\d)", lambda m: f"res{int(m.group(1)) + 1}", key)
        key = re.sub(r"^(conv1|bn1)", r"stem.\1", key)
        key = re.sub(r"downsample\.0", "shortcut", key).replace("downsample.1", "shortcut.norm")
        key = re.sub(r"bn(\d)", r"conv\1.norm", key)
        tensors[key] = tensor
    return tensors


CASES = [
    (network, name)
    for network in NETWORKS
    for name in RESNETS
    # Detectron2 cannot dilate BasicBlocks: refused, see below.
    if not (network in ("VOC-DC5", "VOC-semseg") and name in ("resnet18", "resnet34"))
]


@pytest.mark.parametrize(("network", "name"), CASES)
def test_every_backbone_tensor_comes_from_the_file(network, name):
    tensors = backbone_file(name)
    cfg = load_config(network.split(" ")[0], ["MODEL.DEVICE", "meta", *NETWORKS[network]])
    settings = {f"MODEL.RESNETS.{key}": value for key, value in RESNETS[name].items()}
    apply_settings(cfg, BackboneWeights(tensors, settings, name), ())
    with torch.device("meta"):
        model = build_model(fit_norms(cfg, world_size=1)[0])
    new = load_backbone(model, BackboneWeights(tensors, {}, name))
    stage = re.compile(r"(stem|res[2-5])\.")
    assert [n for n in new if stage.search(n) and "res5.norm" not in n] == []
    assert len(model.state_dict()) - len(new) == len(tensors)


@pytest.mark.parametrize("protocol", ["VOC-DC5-random", "Cityscapes-semseg-random"])
def test_a_shallow_resnet_cannot_be_dilated_and_that_is_said(protocol):
    depth = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    with pytest.raises(UserError, match="dilates res5, which .* cannot do for a ResNet-18"):
        prepare(Options(protocol, overrides=depth, explain=""))

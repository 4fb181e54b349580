"""What a file states about its network must not contradict its tensors."""

import argparse
import json

import pytest
import torch

from moco_common.backbone.architecture import Architecture
from moco_common.backbone.statements import _fits
from moco_det.conversion import CheckpointError, convert
from tests.moco_det.convert_cases import backbone, prefixed, state_dict

BODY = backbone(state_dict())
PLAIN50 = Architecture(50, 1, 64, 64, 256)
MMCV = """model = dict(
    type='DenseCL',
    backbone=dict(
        type='{type}', depth={depth}, in_channels=3, out_indices=[4],
        norm_cfg=dict(type='BN'){more}),
    neck=dict(type='DenseCLNeck', deep_stem=True, depth=99))
"""


def _mmcv(type="ResNet", depth=18, more=""):
    return {"meta": {"config": MMCV.format(type=type, depth=depth, more=more)}}


def _convert(tmp_path, statement, **options):
    torch.save({"state_dict": prefixed("backbone.", BODY), **statement}, tmp_path / "a.pth")
    return convert(tmp_path / "a.pth", proof=False, **options)


CONTRADICTIONS = {
    "arch": {"arch": "resnetaa18"},
    "another depth": {"arch": "resnet34"},
    "mmcv's type": _mmcv("ResNetV1d"),
    "mmcv's depth": _mmcv(depth=34),
    "mmcv's stem": _mmcv(more=", deep_stem=True"),
    "mmcv's dilations": _mmcv(more=", strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)"),
    "mmcv's deformable convolutions": _mmcv(more=", dcn=dict(type='DCN', deform_groups=1)"),
    "Lightning's hyper-parameters": {"hyper_parameters": {"backbone": {"name": "seresnet18"}}},
    "a Lightning argument": {"hyper_parameters": {"backbone": "resnet18_v1d"}},
    "a script's arguments": {"args": argparse.Namespace(model="resnetblur18", lr=1)},
    "torchvision's argument": {
        "hparams": {"model_kwargs": {"replace_stride_with_dilation": [False, False, True]}}
    },
}
AGREEMENTS = {
    "arch": {"arch": "resnet18"},
    "timm's tag": {"arch": "resnet18.a1_in1k"},
    "a path": {"arch": "timm/resnet18"},
    "a method": {"hyper_parameters": {"method": "resnetd_trick", "model": "moco", "arch": "r18"}},
    "mmcv": _mmcv(more=", dilations=(1, 1, 1, 1), style='pytorch', dcn=None, deep_stem=False"),
    "solo-learn": {"hyper_parameters": {"backbone": {"name": "resnet18", "kwargs": {}}}},
    "a script's arguments": {"args": argparse.Namespace(model="resnet18", teacher="resnet50d")},
    "a vision transformer's, beside": {"hyper_parameters": {"text_model": "vit_b"}},
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_file_that_states_another_network_is_refused(tmp_path, case):
    with pytest.raises(
        CheckpointError, match="the file states .* than the plain ResNet-18"
    ) as error:
        _convert(tmp_path, CONTRADICTIONS[case])
    assert error.value.kind == "unsupported"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", AGREEMENTS)
def test_a_file_that_states_its_own_network_is_converted(tmp_path, case):
    assert _convert(tmp_path, AGREEMENTS[case]).report.mapped == len(BODY)


@pytest.mark.parametrize("key", ["arch", "config"])
def test_the_metadata_of_safetensors_are_read(tmp_path, key):
    save_file = pytest.importorskip("safetensors.torch").save_file
    stated = {"arch": "resnetaa18", "config": json.dumps({"architecture": "resnetaa18"})}
    save_file(BODY, tmp_path / "a.safetensors", {key: stated[key]})
    with pytest.raises(CheckpointError, match="resnetaa18"):
        convert(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["resnetaa50", "resnetblur50"])
def test_timms_twins_of_resnet50_are_refused_by_their_arch(tmp_path, name):
    timm = pytest.importorskip("timm")
    tensors = timm.create_model(name, num_classes=2).state_dict()
    torch.save({"arch": name, "state_dict": tensors}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"arch: {name}"):
        convert(tmp_path / "a.pth")


def test_the_names_of_timms_plain_resnets_fit_and_those_of_all_others_do_not():
    """timm's own arguments of each network are the oracle."""
    timm = pytest.importorskip("timm")
    from timm.models import resnet

    wrong = []
    for name in timm.list_models("*resne*50*", module="resnet"):
        with torch.device("meta"):
            model = timm.create_model(name)
        first = model.layer2[0]
        is_plain = (
            type(first) is resnet.Bottleneck
            and tuple(map(len, (model.layer1, model.layer2, model.layer3, model.layer4)))
            == (3, 4, 6, 3)
            and isinstance(model.conv1, torch.nn.Conv2d)
            and isinstance(model.bn1, torch.nn.BatchNorm2d)
            and isinstance(model.maxpool, torch.nn.MaxPool2d)
            and isinstance(first.aa, (torch.nn.Identity, type(None)))
            and first.se is None
            and isinstance(first.downsample[0], torch.nn.Conv2d)
            and first.conv2.groups == 1
        )
        if _fits(name, PLAIN50) != is_plain:
            wrong.append((name, is_plain))
    assert not wrong


@pytest.mark.parametrize(
    "name",
    ["ResNet50_Weights.IMAGENET1K_V2", "moco_v2_resnet50", "resnet50w2", "ResNetEncoder",
     "tv_resnet50", "torchvision.models.resnet50", "resnet-50", "resnet50_v1b",
     "my/resnet50/run3", "vit_base", "microsoft/resnet-50", "ResNet50Backbone", "resnet_v1_50"],
)  # fmt: skip
def test_labels_that_name_no_variant_fit(name):
    assert _fits(name, PLAIN50)


@pytest.mark.parametrize(
    "name",
    ["deeplabv3_resnet50", "fcn_resnet50", "resnet50-dilated", "res2net50", "resnest50d",
     "resnet_101", "ResNetV1c", "SEResNet", "resnext50", "resnet50_os16", "ResNet-D",
     "antialiased/resnet50-lpf",
     "preactresnet50", "resnet50_ibn_a", "resnet50_gn"],
)  # fmt: skip
def test_names_of_variants_do_not(name):
    assert not _fits(name, PLAIN50)


def test_mmcvs_caffe_style_puts_the_stride_into_the_first_convolution(tmp_path):
    style = _mmcv(more=", style='caffe'")
    converted = _convert(tmp_path, style)
    assert converted.metadata["stride_in_1x1"] is True
    assert any("meta.config" in note for note in converted.report.notes)
    assert _convert(tmp_path, style, stride_in_1x1=False).metadata["stride_in_1x1"] is False
    assert _convert(tmp_path, _mmcv()).metadata["stride_in_1x1"] is False


@pytest.mark.parametrize(
    "text", ["backbone=dict(" * 20_000, "backbone=dict(" + "a=(" * 50_000, "{" * 100_000]
)
def test_odd_statements_cost_no_more_than_their_length(tmp_path, text):
    stated = {"meta": {"config": text}, "hyper_parameters": {"config": text, "model": text}}
    assert _convert(tmp_path, stated).report.mapped == len(BODY)

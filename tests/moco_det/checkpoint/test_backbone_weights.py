"""Weights into models: names, shapes, and what the file says of the network."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from moco_common.errors import UserError
from moco_det.checkpoint.backbone_weights import (
    BackboneWeights,
    apply_settings,
    load_backbone,
    read_backbone,
)
from moco_det.checkpoint.detector_weights import (
    holds_detector,
    load_detector,
    load_weights,
    read_detector,
    summarise,
)
from moco_det.config.protocols import load_config
from tests.conftest import NARROW, QUICK, narrow_backbone


def model_of(protocol):
    norms = ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN" if "FPN" in protocol else ""]
    return build_model(load_config(f"{protocol}-random", [*NARROW, *QUICK, *norms]))


@pytest.fixture(scope="module")
def c4():
    return model_of("VOC")


@pytest.fixture
def weights(weights_file):
    return read_backbone(str(weights_file))


def test_every_backbone_tensor_of_a_c4_model_comes_from_the_file(c4, weights):
    """Oracle: the owner of each name, written out: res5 is the head's, the rest the backbone's."""
    new = load_backbone(c4, weights)
    state = c4.state_dict()
    arrays = narrow_backbone()
    for name, array in arrays.items():
        owner = "roi_heads." if name.startswith("res5.") else "backbone."
        np.testing.assert_array_equal(state[owner + name].numpy(), array)
    parameters = {name for name in new if not name.endswith("num_batches_tracked")}
    untouched = {n for n in state if not n.endswith("num_batches_tracked")} - parameters
    assert len(untouched) == len(arrays)
    assert {name.split(".")[0] for name in new} == {"proposal_generator", "roi_heads"}
    assert "roi_heads.res5.norm.weight" in new


def test_every_backbone_tensor_of_an_fpn_model_comes_from_the_file(weights):
    model = model_of("COCO-FPN-1x")
    new = load_backbone(model, weights)
    state = model.state_dict()
    for name, array in narrow_backbone().items():
        np.testing.assert_array_equal(state[f"backbone.bottom_up.{name}"].numpy(), array)
    assert summarise(new).startswith("backbone.fpn_lateral (24), backbone.fpn_output (24), ")


def test_a_missing_tensor_is_named_with_its_shape_and_the_nearest(c4, weights):
    renamed = dict(weights.tensors)
    renamed["res5.0.conv1_.weight"] = renamed.pop("res5.0.conv1.weight")
    with pytest.raises(
        UserError,
        match=r"1 of the model's .*roi_heads\.res5\.0\.conv1\.weight \(32, 64, 1, 1\) \(nearest in "
        r"the file: res5\.0\.conv1_\.weight \(32, 64, 1, 1\)\)",
    ):
        load_backbone(c4, weights._replace(tensors=renamed))


def test_another_shape_is_named_with_both_shapes(c4, weights):
    wrong = weights.tensors | {"stem.conv1.weight": torch.zeros(8, 3, 7, 7)}
    with pytest.raises(
        UserError, match=r"stem\.conv1\.weight \(4, 3, 7, 7\) .*file: \(8, 3, 7, 7\)"
    ):
        load_backbone(c4, weights._replace(tensors=wrong))


def test_nothing_is_copied_when_anything_is_wrong(c4, weights):
    before = {name: tensor.clone() for name, tensor in c4.state_dict().items()}
    wrong = {k: v + 1 for k, v in weights.tensors.items() if k != "res3.1.conv2.weight"}
    with pytest.raises(UserError):
        load_backbone(c4, weights._replace(tensors=wrong))
    assert all(torch.equal(before[name], tensor) for name, tensor in c4.state_dict().items())


def test_a_block_that_the_model_lacks_is_refused(c4, weights):
    more = weights.tensors | {"res4.6.conv1.weight": torch.zeros(16, 64, 1, 1)}
    with pytest.raises(UserError, match=r"have no place in the model \(res4\.6\.conv1\.weight"):
        load_backbone(c4, weights._replace(tensors=more))


def test_missing_running_statistics_are_an_error_unless_the_file_has_none(c4, weights):
    """Caffe2's files have them folded into the affine; a file that has some must have all."""
    some = {k: v for k, v in weights.tensors.items() if k != "res2.0.conv1.norm.running_var"}
    with pytest.raises(UserError, match=r"res2\.0\.conv1\.norm\.running_var"):
        load_backbone(c4, weights._replace(tensors=some))
    none = {k: v for k, v in weights.tensors.items() if ".running_" not in k}
    load_backbone(c4, weights._replace(tensors=none))


def test_the_file_decides_architecture_and_pixel_statistics(weights):
    assert weights.settings == {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 4,
        "MODEL.RESNETS.NUM_GROUPS": 1,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
        "MODEL.PIXEL_MEAN": [120.0, 110.0, 100.0],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }
    cfg = load_config("VOC")
    taken = apply_settings(cfg, weights, explicit=())
    assert taken == [
        "MODEL.RESNETS.STEM_OUT_CHANNELS 4",
        "MODEL.RESNETS.WIDTH_PER_GROUP 4",
        "MODEL.RESNETS.RES2_OUT_CHANNELS 16",
        "MODEL.PIXEL_MEAN [120.0, 110.0, 100.0]",
    ]
    assert apply_settings(cfg, weights, explicit=()) == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["INPUT.FORMAT", "BGR"], "INPUT.FORMAT"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", "True"], "MODEL.RESNETS.STRIDE_IN_1X1"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", "64"], "MODEL.RESNETS.RES2_OUT_CHANNELS"),
    ],
)
def test_an_override_that_contradicts_the_file_is_refused(weights, overrides, key):
    cfg = load_config("VOC", overrides)
    with pytest.raises(UserError, match=f"{key} is set to .*, but .*narrow.pkl requires"):
        apply_settings(cfg, weights, explicit=overrides[::2])


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnet101", "resnet18", "wide_resnet50_2"])
def test_the_architecture_is_read_from_the_tensors(name, tmp_path):
    """Oracle: torchvision's networks, renamed as the reference's converter does."""
    import torchvision

    expected = {  # depth, groups, width per group, stem, res2
        "resnext50_32x4d": (50, 32, 4, 64, 256),
        "resnet101": (101, 1, 64, 64, 256),
        "resnet18": (18, 1, 64, 64, 64),
        "wide_resnet50_2": (50, 1, 128, 64, 256),
    }[name]
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    model = {}
    for key, value in state.items():
        if "layer" not in key:
            key = f"stem.{key}"
        for i in (1, 2, 3, 4):
            key = key.replace(f"layer{i}", f"res{i + 1}")
        for i in (1, 2, 3):
            key = key.replace(f"bn{i}", f"conv{i}.norm")
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        model[key] = torch.zeros(value.shape, dtype=torch.uint8)  # the shapes, in little memory
    path = tmp_path / "w.pth"
    torch.save({"model": model, "__author__": "MOCO", "matching_heuristics": True}, path)
    settings = read_backbone(str(path)).settings
    keys = ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS")
    assert tuple(settings[f"MODEL.RESNETS.{key}"] for key in keys) == expected


def test_a_detector_loads_by_exact_names_only(c4, tmp_path):
    torch.save({"model": c4.state_dict(), "iteration": 3}, tmp_path / "model.pth")
    assert holds_detector(tmp_path / "model.pth")
    other = model_of("VOC")
    checkpoint = read_detector(tmp_path / "model.pth")
    assert checkpoint["iteration"] == 3
    load_detector(other, checkpoint["model"], source="model.pth")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in c4.state_dict().items())
    less = {k: v for k, v in c4.state_dict().items() if "cls_score.bias" not in k}
    with pytest.raises(UserError, match="it lacks roi_heads.box_predictor.cls_score.bias; use"):
        load_detector(other, less, source="model.pth")
    with pytest.raises(UserError, match="has the unexpected tensor roi_heads.keypoint"):
        load_detector(other, c4.state_dict() | {"roi_heads.keypoint": torch.zeros(1)}, source="m")
    wrong = c4.state_dict() | {"roi_heads.box_predictor.cls_score.bias": torch.zeros(5)}
    with pytest.raises(UserError, match=r"cls_score.bias \(5,\) \(expected \(21,\)\)"):
        load_detector(other, wrong, source="m")


def test_a_pickle_that_runs_code_is_refused_and_not_run(c4, tmp_path):
    trace = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return __import__("os").mkdir, (str(trace),)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": {"backbone.x": Evil()}}))
    torch.save({"model": {"backbone.x": Evil()}}, tmp_path / "evil.pth")
    for name in ("evil.pkl", "evil.pth"):
        with pytest.raises(UserError):
            load_weights(c4, str(tmp_path / name))
    assert not trace.exists()


def test_a_missing_file_and_an_unconverted_one_are_named(c4, tmp_path):
    with pytest.raises(UserError, match="the weights file .*none.pkl does not exist"):
        read_backbone(str(tmp_path / "none.pkl"))
    torch.save({"state_dict": {"conv1.weight": torch.zeros(4, 3, 7, 7)}}, tmp_path / "raw.pth")
    with pytest.raises(UserError, match="convert"):
        read_backbone(str(tmp_path / "raw.pth"))


def test_metadata_that_contradict_the_tensors_are_refused(weights_file, tmp_path):
    content = pickle.loads(weights_file.read_bytes())
    content["metadata"]["depth"] = 101
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="state depth 101, but its tensors have 50"):
        read_backbone(str(tmp_path / "odd.pkl"))


def test_backbone_weights_is_a_plain_record(weights):
    assert isinstance(weights, BackboneWeights)
    assert weights.source.endswith("narrow.pkl")

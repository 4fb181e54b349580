"""The -GN siblings: where the norm is another, which weights fit, and that they train."""

import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from moco_common.errors import UserError
from moco_det.checkpoint.backbone_weights import BackboneWeights, load_backbone, read_backbone
from moco_det.checkpoint.detector_weights import load_weights
from moco_det.config.defaults import flatten
from moco_det.config.key_descriptions import explanation
from moco_det.config.protocols import deviations, get_protocol, load_config, protocol_names
from moco_det.engine.explain import explain_key
from moco_det.engine.setup import Options, prepare
from moco_det.modeling.detector import build_detector
from tests.conftest import NARROW, QUICK, narrow_backbone
from tests.moco_det.checkpoint.test_weights_command import write_caffe2
from tools.train_net import main

# The narrowest that 32 groups allow.
WIDE = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "32"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.DC5_CHANNELS", "32", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
]
SMALL = [*QUICK, *WIDE, "MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "SOLVER.MAX_ITER", "1"]


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))]


@pytest.mark.parametrize("name", protocol_names())
@pytest.mark.parametrize("start", ["", "-random", "-supervised"])
def test_a_gn_sibling_differs_from_its_protocol_in_its_norms_alone(name, start):
    plain, grouped = (flatten(get_protocol(f"{n}{start}")) for n in (name, f"{name}-GN"))
    differing = {key for key in plain if plain[key] != grouped[key]}
    layout = {"MODEL.WEIGHTS", "MODEL.RESNETS.STRIDE_IN_1X1"} if start == "-supervised" else set()
    norms = {key for key in differing if key.endswith(".NORM")}
    # Large-scale jitter does without PreciseBN in the first place.
    precise = {"TEST.PRECISE_BN.ENABLED"} if plain["TEST.PRECISE_BN.ENABLED"] else set()
    assert differing - norms == {"PROTOCOL", "SOURCE"} | precise | layout
    assert "MODEL.RESNETS.NORM" in norms
    for key in norms:
        assert plain[key] in ("SyncBN", "naiveSyncBN", "naiveSyncBN_N")
        assert grouped[key] == "GN"
    assert grouped["PROTOCOL"] == f"{name}-GN{start}"
    assert not any("BN" in str(grouped[key]) for key in grouped if key.endswith(".NORM"))


def test_a_gn_sibling_is_its_own_protocol_and_says_that_it_is_no_published_one():
    cfg = load_config("VOC-GN-random", ["SOLVER.BASE_LR", "0.01"])
    assert deviations(cfg) == ["SOLVER.BASE_LR 0.02 -> 0.01"]
    said = explanation(cfg)
    assert said[0].startswith("Protocol VOC-GN, from random weights")
    assert "unpublished variant of this project: VOC with group norm (Wu and He 2018" in said[1]
    assert "GN" in explain_key("MODEL.RESNETS.NORM")
    with pytest.raises(UserError, match=r"'VO-GN'; did you mean VOC\\?.*optionally with -GN"):
        get_protocol("VO-GN")


@pytest.mark.parametrize("protocol", ["VOC-GN", "VOC-DC5-GN", "COCO-FPN-1x-4conv1fc-GN"])
def test_a_gn_sibling_trains_a_step_on_one_image_a_process(
    protocol, voc_dir, coco_spec, tmp_path, capsys
):
    """One image a pass: what batch norm would not survive, and what is warned of there."""
    data = (coco_spec, coco_spec) if "COCO" in protocol else (f"voc:{voc_dir}:trainval",) * 2
    run = tmp_path / "run"
    args = ["--config", f"{protocol}-random", "--train-data", data[0], "--test-data", data[1]]
    args += ["--output-dir", str(run), *SMALL, "SOLVER.IMS_PER_BATCH", "1"]
    assert main(args) == 0, capsys.readouterr().err
    assert "one image" not in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results["protocol"] == protocol
    state = torch.load(run / "model_final.pth", weights_only=True)["model"]
    assert not any(name.endswith("running_mean") for name in state)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_semantic_segmentation_has_a_gn_sibling_too():
    cfg = load_config("VOC-semseg-GN-random", [*SMALL])
    model = build_model(cfg).train()
    assert {type(norm) for norm in norms_of(model)} == {nn.GroupNorm}
    image = torch.randint(0, 256, (3, 33, 33), dtype=torch.uint8)
    losses = model([{"image": image, "sem_seg": torch.zeros(33, 33, dtype=torch.long)}])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weights_with_batch_norm_do_not_fit_and_it_is_said(weights_file, voc_dir, tmp_path):
    data = [f"voc:{voc_dir}:trainval"]
    overrides = ["MODEL.WEIGHTS", str(weights_file), "MODEL.DEVICE", "cpu"]
    with pytest.raises(UserError, match=r"pre-trained with batch norm.*cannot use.*-GN-random"):
        prepare(Options("VOC-GN", data, output_dir=str(tmp_path / "a"), overrides=overrides))
    with pytest.raises(UserError, match="pre-trained with batch norm"):
        load_backbone(
            build_model(load_config("VOC-GN-random", SMALL)), read_backbone(str(weights_file))
        )
    # Its architecture alone is no weights: the comparison from random weights stays possible.
    like = ["MODEL.ARCHITECTURE_FROM", str(weights_file), "MODEL.DEVICE", "cpu"]
    plan = prepare(Options("VOC-GN-random", data, output_dir=str(tmp_path / "b"), overrides=like))
    assert plan.cfg.MODEL.RESNETS.STEM_OUT_CHANNELS == 4
    with pytest.raises(UserError, match="number of channels is not a multiple of 32"):
        build_detector(plan.cfg)


def test_weights_with_group_norm_do_not_fit_batch_norm():
    tensors = {
        name: torch.from_numpy(array)
        for name, array in narrow_backbone().items()
        if "running_" not in name
    }
    weights = BackboneWeights(tensors, {}, "gn.pkl", group_norm=True)
    norms = ["MODEL.RESNETS.NORM", "BN"]
    model = build_model(load_config("VOC-random", [*NARROW, *QUICK, *norms]))
    with pytest.raises(UserError, match=r"no statistics for this model's batch norm.*-GN sibling"):
        load_backbone(model, weights)


def test_detectrons_gn_file_fills_the_supervised_sibling_as_detectron2_does(tmp_path):
    overrides = ["MODEL.WEIGHTS", "", *SMALL]
    model = build_model(load_config("VOC-GN-supervised", overrides))
    generator = torch.Generator().manual_seed(0)
    arrays = {
        short: torch.randn(value.shape, generator=generator).numpy()
        for name, value in model.state_dict().items()
        if (short := name.removeprefix("backbone.").removeprefix("roi_heads."))
        and short.startswith(("stem.", "res"))
        and not short.startswith("res5.norm")
    }
    file = write_caffe2(tmp_path / "R-50-GN.pkl", arrays, norm="gn")
    weights = read_backbone(str(file))
    assert weights.group_norm
    published = get_protocol("VOC-GN-supervised")
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"):
        assert weights.settings[key] == flatten(published)[key]
    load_weights(model, str(file))
    theirs = build_model(load_config("VOC-GN-supervised", overrides))
    DetectionCheckpointer(theirs).load(str(file))
    expected = theirs.state_dict()
    for name, value in model.state_dict().items():
        if "backbone" in name or ("res5" in name and "res5.norm" not in name):
            assert torch.equal(value, expected[name]), name

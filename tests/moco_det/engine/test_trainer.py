"""The trainer's promises: everything trained, safe checkpoints, a full record."""

import json

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from moco_common.errors import UserError
from moco_det.checkpoint.run_checkpointer import RunCheckpointer
from moco_det.config.protocols import load_config
from moco_det.engine.hooks import PreciseBN
from moco_det.evaluation.results import write_results
from moco_det.modeling.detector import assert_all_trained, fit_norms
from tests.conftest import NARROW, QUICK
from tools.train_net import main


def config(protocol="VOC-random", *overrides):
    return load_config(protocol, [*NARROW, *QUICK, *overrides])


@pytest.mark.parametrize("protocol", ["VOC-random", "COCO-C4-1x-random", "COCO-FPN-1x-random"])
def test_every_parameter_of_a_protocol_is_trained(protocol):
    cfg, _ = fit_norms(config(protocol), world_size=1)
    model = build_model(cfg)
    assert_all_trained(model, cfg.MODEL.BACKBONE.FREEZE_AT)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("protocol", "overrides", "named"),
    [
        ("VOC-random", ["MODEL.RESNETS.NORM", "FrozenBN"], "MODEL.RESNETS.NORM is FrozenBN"),
        ("COCO-FPN-1x-random", ["MODEL.FPN.NORM", "FrozenBN"], "MODEL.FPN.NORM is FrozenBN"),
    ],
)
def test_a_frozen_layer_or_norm_is_refused_with_its_key(protocol, overrides, named):
    cfg, _ = fit_norms(config(protocol, *overrides), world_size=1)
    with pytest.raises(UserError, match=named):
        assert_all_trained(build_model(cfg), cfg.MODEL.BACKBONE.FREEZE_AT)


def test_a_frozen_parameter_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].bias.requires_grad = False
    with pytest.raises(UserError, match=r"1 parameter would .* 0\.bias"):
        assert_all_trained(model, 0)


@pytest.mark.parametrize(
    ("protocol", "world_size", "device", "resnet", "fpn"),
    [
        ("VOC", 1, "cpu", "BN", ""),
        ("VOC", 1, "cuda", "BN", ""),
        ("VOC", 2, "cpu", "naiveSyncBN", ""),
        ("VOC", 8, "cuda", "naiveSyncBN", ""),
        ("COCO-FPN-1x", 1, "cpu", "BN", "BN"),
        ("COCO-FPN-1x", 2, "cpu", "SyncBN", "SyncBN"),
        ("COCO-FPN-1x", 8, "cuda", "SyncBN", "SyncBN"),
    ],
)
def test_synchronised_norms_are_fitted_to_the_machine_and_said(
    protocol, world_size, device, resnet, fpn
):
    cfg = load_config(protocol, ["MODEL.DEVICE", device])
    fitted, said = fit_norms(cfg, world_size)
    assert (resnet, fpn) == (fitted.MODEL.RESNETS.NORM, fitted.MODEL.FPN.NORM)
    assert (said is None) == (resnet == cfg.MODEL.RESNETS.NORM)
    assert cfg == load_config(protocol, ["MODEL.DEVICE", device])  # the protocol stays as it is


def test_a_checkpoint_is_written_whole_and_read_back_exactly(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    RunCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_final", iteration=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]

    other = nn.Linear(3, 2)
    fresh = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    checkpointer = RunCheckpointer(other, str(tmp_path), optimizer=fresh)
    assert checkpointer.load(checkpointer.get_checkpoint_file()) == {"iteration": 4}
    assert torch.equal(other.weight, model.weight)
    assert fresh.param_groups[0]["lr"] == 0.1
    old, new = (next(iter(o.state.values()))["momentum_buffer"] for o in (optimizer, fresh))
    assert torch.equal(old, new)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = nn.Linear(3, 2)
    checkpointer = RunCheckpointer(model, str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()

    def interrupted(_, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(OSError, match="no space"):
        checkpointer.save("model_final")
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]


def test_the_newest_checkpoint_that_can_be_read_is_taken(tmp_path, caplog):
    model = nn.Linear(3, 2)
    checkpointer = RunCheckpointer(model, str(tmp_path))
    assert checkpointer.load_newest() is None
    for iteration, name in enumerate(["model_0000000", "model_0000001", "model_final"]):
        nn.init.constant_(model.weight, iteration)
        checkpointer.save(name, iteration=iteration)
    assert checkpointer.load_newest() == {"iteration": 2}
    (tmp_path / "last_checkpoint").write_text("model_0000000.pth")  # what a person may do
    assert checkpointer.load_newest() == {"iteration": 0}
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    (tmp_path / "model_final.pth").write_bytes(b"PK\x03\x04 cut off")
    assert checkpointer.load_newest() == {"iteration": 1}
    assert model.weight[0, 0] == 1
    assert caplog.text.count("warning: skipped") == 2
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="model_0000009"):
        checkpointer.load_newest()


def test_another_detectors_checkpoint_is_refused_not_passed_over(tmp_path):
    RunCheckpointer(nn.Linear(3, 2), str(tmp_path)).save("model_0000000", iteration=0)
    RunCheckpointer(nn.Linear(3, 5), str(tmp_path)).save("model_final", iteration=1)
    with pytest.raises(UserError, match="of a different detector"):
        RunCheckpointer(nn.Linear(3, 2), str(tmp_path)).load_newest()


def test_weights_alone_cannot_be_resumed_from(tmp_path):
    model = nn.Linear(3, 2)
    RunCheckpointer(model, str(tmp_path)).save("weights")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="holds no optimizer state"):
        RunCheckpointer(model, "", optimizer=optimizer).load(str(tmp_path / "weights.pth"))


def test_results_are_json_with_null_for_what_cannot_be_measured(tmp_path):
    cfg = config("VOC-random", "OUTPUT_DIR", str(tmp_path), "SEED", "7")
    scores = {"bbox": {"AP": 12.5, "APs": float("nan"), "per_class": {"nut": float("nan")}}}
    write_results(cfg, scores, "voc:DATA:test", iteration=2, explanation=["It is short."])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["bbox"] == {"AP": 12.5, "APs": None, "per_class": {"nut": None}}
    assert (results["protocol"], results["init"], results["seed"]) == ("VOC", "random", 7)
    assert (results["dataset"], results["iteration"]) == ("voc:DATA:test", 2)
    assert "SOLVER.MAX_ITER 24000 -> 2" in results["deviations"]
    assert results["explanation"] == ["It is short."]


def test_a_run_ends_with_the_statistics_of_the_images_of_precise_bn(voc_dir, tmp_path, monkeypatch):
    """The first BN's inputs, computed with a plain convolution, and their moments in float64."""
    expected = []
    update = PreciseBN.update_stats

    def watched(self):
        update(self)
        conv = self.model.backbone.stem.conv1
        pixels = []
        for _, batch in self.batches():
            images = self.model.preprocess_image(batch).tensor
            x = F.conv2d(images, conv.weight, None, conv.stride, conv.padding)
            pixels.append(x.detach().double().movedim(1, 0).flatten(1))
        joined = torch.cat(pixels, 1)
        expected.append((joined.mean(1), joined.var(1, correction=0)))

    monkeypatch.setattr(PreciseBN, "update_stats", watched)
    train = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval", *NARROW, *QUICK]
    assert main([*train, "TEST.EVAL_PERIOD", "2", "--output-dir", str(tmp_path / "run")]) == 0
    ((mean, var),) = expected  # after the last iteration, once
    state = torch.load(tmp_path / "run/model_final.pth", weights_only=True)["model"]
    at = "backbone.stem.conv1.norm.running"
    torch.testing.assert_close(state[f"{at}_mean"].double(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state[f"{at}_var"].double(), var, rtol=1e-4, atol=1e-4)

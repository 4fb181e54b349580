"""Frozen stages and learning rates by stage: exactly the parameters meant, and only if stated."""

import json

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model

from moco_common.errors import UserError
from moco_det.config.protocols import load_config
from moco_det.engine.optimizer import build_optimizer
from moco_det.modeling.detector import assert_all_trained, fit_norms, stage_of
from tests.conftest import NARROW, QUICK
from tools.train_net import main

FACTORS = [0.1, 0.2, 0.3, 0.5, 0.7]


def model_of(protocol, *overrides):
    cfg, _ = fit_norms(load_config(protocol, [*NARROW, *QUICK, *overrides]), world_size=1)
    return cfg, build_model(cfg)


def command(voc_dir, folder, weights, *overrides):
    data = ["--train-data", f"voc:{voc_dir}:trainval", "--test-data", f"voc:{voc_dir}:test"]
    settings = [*QUICK, "MODEL.WEIGHTS", str(weights), "SOLVER.BASE_LR", "0.001", *overrides]
    return ["--config", "VOC", *data, "--output-dir", str(folder), *settings]


@pytest.mark.parametrize(
    ("protocol", "prefix"), [("VOC", "backbone"), ("COCO-FPN-1x", "backbone.bottom_up")]
)
def test_exactly_the_first_stages_are_frozen(protocol, prefix):
    cfg, model = model_of(protocol, "MODEL.BACKBONE.FREEZE_AT", "2")
    assert_all_trained(model, 2)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = (f"{prefix}.stem.", f"{prefix}.res2.")
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(expected)} != set()
    norms = [n for n, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    assert norms
    assert all(name.startswith(expected) for name in norms)
    with pytest.raises(UserError, match="FrozenBN"):
        assert_all_trained(model, 1)  # res2 was not meant
    optimized = {id(p) for g in build_optimizer(cfg, model).param_groups for p in g["params"]}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("protocol", ["VOC", "COCO-FPN-1x", "VOC-DC5"])
def test_each_stage_has_its_learning_rate_and_new_layers_the_full_one(protocol):
    """Against the names themselves; the C4 head's res5 counts, the norm after it does not."""
    cfg, model = model_of(protocol, "SOLVER.STAGE_LR_FACTORS", str(FACTORS))
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    plain_cfg = load_config(protocol, [*NARROW, *QUICK])
    plain = {
        id(p): group["weight_decay"]
        for group in build_optimizer(plain_cfg, model).param_groups
        for p in group["params"]
    }
    seen = set()
    for name, parameter in model.named_parameters():
        factor = 1.0
        for stage, own in zip(("stem", "res2", "res3", "res4", "res5"), FACTORS, strict=True):
            if f".{stage}." in name and "fpn" not in name and ".res5.norm." not in name:
                factor = own
        assert rates[id(parameter)][0] == pytest.approx(cfg.SOLVER.BASE_LR * factor), name
        assert rates[id(parameter)][1] == plain[id(parameter)]
        seen.add(factor)
    assert seen == {*FACTORS, 1.0}
    assert len(rates) == len(list(model.parameters()))


def test_stages_are_told_by_name():
    assert stage_of("backbone.stem.conv1.norm.weight") == "stem"
    assert stage_of("backbone.bottom_up.res3.0.conv1.norm") == "res3"
    assert stage_of("roi_heads.res5.0.conv1.weight") == "res5"
    for name in (
        "roi_heads.res5.norm.weight",
        "backbone.fpn_lateral2.weight",
        "backbone.conv.bias",
    ):
        assert stage_of(name) is None


def test_frozen_stages_stay_and_the_deviation_is_logged_and_recorded(
    voc_dir, weights_file, tmp_path, capsys
):
    settings = ["MODEL.BACKBONE.FREEZE_AT", "2", "SOLVER.STAGE_LR_FACTORS", str(FACTORS)]
    settings += ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "3"]
    line = command(voc_dir, tmp_path / "run", weights_file, *settings)
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "frozen     stem, res2 of the backbone, with their BN" in printed
    assert "MODEL.BACKBONE.FREEZE_AT 0 -> 2" in printed
    first, last = (
        torch.load(tmp_path / "run" / name, weights_only=True)["model"]
        for name in ("model_0000000.pth", "model_final.pth")
    )
    changed = {n for n in first if not torch.equal(first[n], last[n])}
    assert not [n for n in changed if n.startswith(("backbone.stem", "backbone.res2"))]
    assert any(n.startswith("backbone.res3") for n in changed)
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert any("FREEZE_AT" in line for line in record["deviations"])
    (tmp_path / "run" / "model_final.pth").unlink()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    assert main([*line, "--resume"]) == 0  # the optimizer's groups fit
    again = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(again[name], last[name]) for name in last)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.BACKBONE.FREEZE_AT", "5"], "this backbone has 4 stages to freeze"),
        (["SOLVER.STAGE_LR_FACTORS", "[0.1, 0.2]"], "give 5 positive numbers"),
        (["SOLVER.STAGE_LR_FACTORS", "[0.0, 1.0, 1.0, 1.0, 1.0]"], "give 5 positive numbers"),
        (
            ["SOLVER.STAGE_LR_FACTORS", str(FACTORS), "SOLVER.BIAS_LR_FACTOR", "2.0"],
            "exclude each other",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    overrides, message, voc_dir, weights_file, tmp_path, capsys
):
    assert main(command(voc_dir, tmp_path / "run", weights_file, *overrides)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_detectron2s_default_freezes_nothing_unless_it_is_stated(
    voc_dir, weights_file, tmp_path, capsys
):
    config = tmp_path / "own.yaml"
    config.write_text("VERSION: 2\nMODEL:\n  MASK_ON: false\n")
    line = command(voc_dir, tmp_path / "run", weights_file)
    line[1] = str(config)
    assert main(line) == 1
    assert "FREEZE_AT is 2, Detectron2's default" in capsys.readouterr().err

"""Every method on the one harness: one process against several, whole runs, resume, export."""

import json
import re

import cv2
import numpy as np
import pytest
import torch

from moco_det import convert
from pretrain import checkpoint
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.methods import METHODS, build_method
from pretrain.train import train
from tests.pretrain import tiny
from tests.pretrain.ranks import on_ranks

NEW = [name for name in METHODS if name != "moco"]


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_take_the_steps_of_one(world):
    expected = tiny.steps_of_all(world)
    for rank, results in enumerate(on_ranks(world, tiny.steps_of_all, world)):
        for words, result, alone in zip(tiny.settings(world), results, expected, strict=True):
            if rank > 0:
                alone["state"] = {}
            torch.testing.assert_close(
                result, alone, rtol=1e-6, atol=1e-8, msg=lambda m, w=words: f"{w}: {m}"
            )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(13):  # not a multiple of the batch
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.jpg"), cv2.resize(coarse, (60, 48)))
    return folder


def tensors_of(state, prefix=""):
    for name, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, dict | list):
            yield from tensors_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def assert_same_ends(whole, broken):
    one, other = (checkpoint.load(folder / checkpoint.LAST) for folder in (whole, broken))
    assert one["step"] == 6
    expected = dict(tensors_of({key: one[key] for key in ("state_dict", "optimizer")}))
    for name, value in tensors_of({key: other[key] for key in ("state_dict", "optimizer")}):
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[name]), name
    return one


def test_runs_of_two_ranks_resume_bit_for_bit_and_save_the_bank_whole(photographs, tmp_path):
    names = ["memory-bank", "swav"]
    on_ranks(2, tiny.whole_and_resumed, names, str(photographs), str(tmp_path))
    ends = [
        assert_same_ends(tmp_path / name / "whole", tmp_path / name / "broken") for name in names
    ]
    bank = ends[0]["state_dict"]["bank._extra_state"]
    assert bank.shape == (13, 8)
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(13))


@pytest.mark.parametrize("method", NEW)
def test_a_run_of_each_recipe_resumes_bit_for_bit_and_exports_its_encoder(
    method, photographs, tmp_path
):
    tiny.whole_and_resumed([method], photographs, tmp_path)
    whole, broken = tmp_path / method / "whole", tmp_path / method / "broken"
    one = assert_same_ends(whole, broken)
    converted = convert(whole / checkpoint.LAST, "torchvision", output=tmp_path / "weights.pth")
    assert converted.report
    weights = torch.load(tmp_path / "weights.pth", weights_only=True)
    exported = one["state_dict"]["encoder_q.layer4.1.bn2.running_mean"]
    assert torch.equal(weights["layer4.1.bn2.running_mean"], exported)


@pytest.mark.parametrize("method", NEW)
def test_each_method_learns_thirteen_photographs(method, photographs, tmp_path):
    longer = "SOLVER.MAX_ITER 40 SOLVER.OPTIMIZER sgd SOLVER.BASE_LR 0.05 CHECKPOINT.PERIOD 40"
    cfg = tiny.recipe(
        method, photographs, tmp_path, *longer.split(), "INPUT.AUGMENTATION", "moco-v1"
    )
    train(cfg)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.json").open()]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1


def test_the_recipes_are_the_papers():
    learning = {  # batch, learning rate, weight decay, epochs
        "end-to-end": (1024, 0.12, 1e-4, 200),
        "memory-bank": (256, 0.03, 1e-4, 200),
        "simclr": (4096, 4.8, 1e-6, 100),
        "byol": (4096, 3.2, 1.5e-6, 1000),
        "swav": (4096, 4.8, 1e-6, 800),
    }
    for name, expected in learning.items():
        cfg = load_config(name)
        solver = cfg.SOLVER
        assert name == cfg.METHOD
        found = (solver.BATCH_SIZE, solver.BASE_LR, solver.WEIGHT_DECAY, solver.EPOCHS)
        assert found == expected
        assert (solver.OPTIMIZER == "lars") == (name in ("simclr", "byol", "swav"))
        assert (solver.MOMENTUM, cfg.MODEL.DEPTH, cfg.INPUT.CROP_SIZE) == (0.9, 50, 224)
    assert (load_config("swav").INPUT.SMALL_CROPS, load_config("swav").SWAV.PROTOTYPES) == (6, 3000)


def test_an_unknown_method_is_refused_with_the_names():
    cfg = load_config("moco-v1", ["METHOD", "mocco"])
    with pytest.raises(UserError, match="choose one of moco, end-to-end, memory-bank, simclr"):
        build_method(cfg, num_images=10, total_steps=1)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("end-to-end", "MOCO.TEMPERATURE", 0.0),
        ("memory-bank", "MOCO.TEMPERATURE", -1.0),
        ("memory-bank", "BANK.MOMENTUM", 1.0),
        ("memory-bank", "BANK.NEGATIVES", 25),
        ("simclr", "SIMCLR.TEMPERATURE", 0.0),
        ("byol", "BYOL.MOMENTUM", 1.5),
        ("swav", "SWAV.EPSILON", 0.001),
        ("swav", "SWAV.PROTOTYPES", 0),
    ],
)
def test_an_impossible_setting_names_its_key(method, key, value):
    with pytest.raises(UserError, match=re.escape(key)):
        tiny.build(method, key, value)

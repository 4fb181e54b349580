"""Every method on the one harness: one process against several, whole runs, resume, export."""

import json
import math
import re

import cv2
import numpy as np
import pytest
import torch
import yaml

from moco_common.errors import UserError
from moco_det import convert
from moco_det.report.build import build_report
from moco_det.report.runs import read_runs
from pretrain.checkpoint import format as checkpoint
from pretrain.config.defaults import load_config
from pretrain.engine.train_loop import train
from pretrain.inspection.run_directory import open_run
from pretrain.methods import METHODS, build_method
from pretrain.modeling.resnet import ResNet
from pretrain.solver.schedules import warmup_steps
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
        (folder / f"class {i % 3}").mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"class {i % 3}/{i}.jpg"), cv2.resize(coarse, (60, 48)))
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


@pytest.mark.parametrize("method", NEW)
def test_runs_of_two_ranks_resume_bit_for_bit_and_save_the_bank_whole(
    method, photographs, tmp_path
):
    on_ranks(2, tiny.whole_and_resumed, [method], str(photographs), str(tmp_path))
    end = assert_same_ends(tmp_path / method / "whole", tmp_path / method / "broken")
    if method == "memory-bank":
        bank = end["state_dict"]["bank._extra_state"]
        assert bank.shape == (13, 8)
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(13))


@pytest.mark.parametrize(
    ("method", "follower"),
    [
        ("moco", "encoder_k"),
        ("end-to-end", "encoder_k"),
        ("byol", "target"),
        ("dense-cl", "encoder_k"),
        ("pixpro", "target"),
        ("slot-con", "target"),
    ],
)
def test_the_second_encoder_starts_as_a_copy_of_the_query_encoder(method, follower):
    built, _ = tiny.build(method)
    first, second = built.encoder_q.state_dict(), getattr(built, follower).state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    mine = {p.data_ptr() for p in built.encoder_q.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in getattr(built, follower).parameters())


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
    backbone = {
        name.removeprefix("encoder_q."): tensor
        for name, tensor in one["state_dict"].items()
        if name.startswith("encoder_q.") and not name.startswith("encoder_q.fc.")
    }
    assert weights.keys() == backbone.keys() == ResNet(18, width=1 / 16).state_dict().keys()
    for name, tensor in backbone.items():
        assert torch.equal(weights[name], tensor), name


# Settings of `tiny.recipe`: K + 1 keys, a batch of 8, both views of it but oneself, 12 prototypes.
CHANCE = {
    "moco": math.log(20 + 1),
    "end-to-end": math.log(8),
    "memory-bank": math.log(5 + 1),
    "simclr": math.log(2 * 8 - 1),
    "byol": None,
    "swav": math.log(12),
    "dense-cl": math.log(20 + 1),
    "pixpro": None,
    "supervised": math.log(3),
    "slot-con": None,
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_records_its_chance_loss_and_the_report_compares_with_it(
    method, photographs, tmp_path
):
    recipe = "moco-v2" if method == "moco" else method
    short = ("MOCO.QUEUE_SIZE", "20", "SOLVER.MAX_ITER", "2")
    train(tiny.recipe(recipe, photographs, tmp_path / "run", *short), quiet=True)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.json").open()]
    expected = CHANCE[method]
    recorded = [record.get("chance_loss") for record in records]
    assert recorded == ([None] * 2 if expected is None else pytest.approx([expected] * 2))
    report = build_report(read_runs([tmp_path / "run"]))
    (values,) = report.as_dict()["pretraining"]
    assert values["chance_loss"] == (None if expected is None else pytest.approx(expected))
    assert "chance loss" in report.text()


def test_a_run_records_what_its_method_reads_and_a_record_of_everything_is_resumed(
    photographs, tmp_path
):
    cfg = tiny.recipe("memory-bank", photographs, tmp_path, "SOLVER.MAX_ITER", "3")
    train(cfg, quiet=True)
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert {"MOCO", "BANK", "SOLVER", "METHOD"} <= recorded.keys()
    assert not {"SIMCLR", "BYOL", "SWAV"} & recorded.keys()
    state = checkpoint.load(tmp_path / checkpoint.LAST)
    assert yaml.safe_load(state["config"]) == recorded
    # Earlier versions recorded the keys of every method; they may even differ by now.
    everything = yaml.safe_load(cfg.dump())
    everything["SWAV"]["PROTOTYPES"] = 99
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    checkpoint.save(state | {"config": yaml.safe_dump(everything)}, tmp_path)
    train(cfg, resume=True, quiet=True)
    assert open_run(tmp_path).build().chance_loss == pytest.approx(math.log(6))
    everything["BANK"]["NEGATIVES"] = 6
    checkpoint.save(state | {"config": yaml.safe_dump(everything)}, tmp_path)
    with pytest.raises(UserError, match="BANK.NEGATIVES was 6 and is now 5"):
        train(cfg, resume=True, quiet=True)


@pytest.mark.parametrize("method", NEW)
def test_each_method_learns_thirteen_photographs(method, photographs, tmp_path):
    longer = "SOLVER.MAX_ITER 40 SOLVER.OPTIMIZER sgd SOLVER.BASE_LR 0.05 CHECKPOINT.PERIOD 40"
    if method == "simclr":  # its loss hardly moves with crops of so small images
        longer += " SOLVER.MAX_ITER 80 SOLVER.BASE_LR 0.3 INPUT.MIN_SCALE 0.8"
    cfg = tiny.recipe(
        method, photographs, tmp_path, *longer.split(), "INPUT.AUGMENTATION", "moco-v1"
    )
    train(cfg)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.json").open()]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1


# Of each paper, by the keys that its recipe's result depends on. (MoCo's are in test_config.)
PAPERS = {
    "end-to-end": {
        "INPUT": {"AUGMENTATION": "moco-v1", "MIN_SCALE": 0.2, "SMALL_CROPS": 0},
        "MODEL": {"SYNC_BN": False, "BN_GROUPS": 8},
        "MOCO": {"DIM": 128, "TEMPERATURE": 0.07, "MLP": False, "SHUFFLE_BN": True},
        "SOLVER": {"OPTIMIZER": "sgd", "BATCH_SIZE": 1024, "BASE_LR": 0.12, "WEIGHT_DECAY": 1e-4},
        "length": {"EPOCHS": 200, "SCHEDULE": "step", "MILESTONES": [0.6, 0.8], "GAMMA": 0.1},
    },
    "memory-bank": {
        "INPUT": {"AUGMENTATION": "moco-v1", "MIN_SCALE": 0.2, "SMALL_CROPS": 0},
        "MODEL": {"SYNC_BN": False},
        "MOCO": {"DIM": 128, "TEMPERATURE": 0.07, "MLP": False},
        "BANK": {"NEGATIVES": 65536, "MOMENTUM": 0.5},
        "SOLVER": {"OPTIMIZER": "sgd", "BATCH_SIZE": 256, "BASE_LR": 0.03, "WEIGHT_DECAY": 1e-4},
        "length": {"EPOCHS": 200, "SCHEDULE": "step", "MILESTONES": [0.6, 0.8], "GAMMA": 0.1},
    },
    "simclr": {
        "INPUT": {"AUGMENTATION": "simclr", "MIN_SCALE": 0.08, "SMALL_CROPS": 0},
        "MODEL": {"SYNC_BN": True},
        "SIMCLR": {"DIM": 128, "TEMPERATURE": 0.1},
        "SOLVER": {"OPTIMIZER": "lars", "BATCH_SIZE": 4096, "BASE_LR": 4.8, "WEIGHT_DECAY": 1e-6},
        "length": {"EPOCHS": 100, "SCHEDULE": "cosine"},
    },
    "byol": {
        "INPUT": {"AUGMENTATION": "byol", "MIN_SCALE": 0.08, "SMALL_CROPS": 0},
        "MODEL": {"SYNC_BN": True},
        "BYOL": {"HIDDEN": 4096, "DIM": 256, "MOMENTUM": 0.996},
        "SOLVER": {"OPTIMIZER": "lars", "BATCH_SIZE": 4096, "BASE_LR": 3.2, "WEIGHT_DECAY": 1.5e-6},
        "length": {"EPOCHS": 1000, "SCHEDULE": "cosine"},
    },
    "swav": {
        "INPUT": {
            "AUGMENTATION": "swav",
            "SMALL_CROPS": 6,
            "SMALL_CROP_SIZE": 96,
            "SMALL_SCALE": 0.14,
        },
        "MODEL": {"SYNC_BN": True},
        "SWAV": {
            "HIDDEN": 2048,
            "DIM": 128,
            "PROTOTYPES": 3000,
            "TEMPERATURE": 0.1,
            "EPSILON": 0.05,
            "SINKHORN_ITERS": 3,
            "FREEZE_ITERS": 313,
            "QUEUE_SIZE": 0,
        },
        "SOLVER": {"OPTIMIZER": "lars", "BATCH_SIZE": 4096, "BASE_LR": 4.8, "WEIGHT_DECAY": 1e-6},
        "length": {"EPOCHS": 800, "SCHEDULE": "cosine"},
    },
    "dense-cl": {
        "INPUT": {"AUGMENTATION": "moco-v2", "MIN_SCALE": 0.2, "SMALL_CROPS": 0},
        "MODEL": {"SYNC_BN": False, "BN_GROUPS": 8},
        "MOCO": {
            **{"DIM": 128, "QUEUE_SIZE": "auto", "MOMENTUM": 0.999, "TEMPERATURE": 0.2},
            **{"MLP": True, "MLP_BN": False, "SHUFFLE_BN": True},
        },
        "DENSECL": {"WEIGHT": 0.5},
        "SOLVER": {"OPTIMIZER": "sgd", "BATCH_SIZE": 256, "BASE_LR": 0.03, "WEIGHT_DECAY": 1e-4},
        "length": {"EPOCHS": 200, "SCHEDULE": "cosine"},
    },
    "supervised": {
        "INPUT": {"AUGMENTATION": "moco-v1", "MIN_SCALE": 0.08, "SMALL_CROPS": 0},
        "MODEL": {"SYNC_BN": False, "BN_GROUPS": 8},
        "SUPERVISED": {"CLASSES": 0},
        "SOLVER": {"OPTIMIZER": "sgd", "BATCH_SIZE": 256, "BASE_LR": 0.1, "WEIGHT_DECAY": 1e-4},
        "length": {"EPOCHS": 90, "SCHEDULE": "step", "GAMMA": 0.1},
    },
    "slot-con": {
        "INPUT": {"AUGMENTATION": "byol", "MIN_SCALE": 0.08, "SMALL_CROPS": 0},
        "MODEL": {"SYNC_BN": True},
        "SLOTCON": {
            **{"HIDDEN": 4096, "DIM": 256, "SLOTS": 256, "GROUP_WEIGHT": 0.5, "MOMENTUM": 0.99},
            **{"STUDENT_TEMPERATURE": 0.1, "TEACHER_TEMPERATURE": 0.07},
            **{"SLOT_TEMPERATURE": 0.2, "CENTRE_MOMENTUM": 0.9},
        },
        "SOLVER": {"OPTIMIZER": "lars", "BATCH_SIZE": 512, "BASE_LR": 2.0, "WEIGHT_DECAY": 1e-5},
        "length": {"EPOCHS": 800, "SCHEDULE": "cosine", "WARMUP_EPOCHS": 5},
    },
    "pixpro": {
        "INPUT": {"AUGMENTATION": "byol", "MIN_SCALE": 0.08, "SMALL_CROPS": 0},
        "MODEL": {"SYNC_BN": True},
        "PIXPRO": {
            **{"HIDDEN": 4096, "DIM": 256, "THRESHOLD": 0.7, "SHARPNESS": 2.0},
            **{"INSTANCE_WEIGHT": 0.0, "MOMENTUM": 0.99},
        },
        "SOLVER": {"OPTIMIZER": "lars", "BATCH_SIZE": 1024, "BASE_LR": 4.0, "WEIGHT_DECAY": 1e-5},
        "length": {"EPOCHS": 400, "SCHEDULE": "cosine", "WARMUP_EPOCHS": 5},
    },
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_is_its_papers(name):
    cfg = load_config(name)
    assert name == cfg.METHOD
    for section, values in PAPERS[name].items():
        found = cfg["SOLVER" if section == "length" else section]
        assert {key: found[key] for key in values} == values
    solver = cfg.SOLVER
    assert (solver.MOMENTUM, cfg.MODEL.DEPTH, cfg.MODEL.WIDTH) == (0.9, 50, 1.0)
    assert (cfg.INPUT.CROP_SIZE, solver.TRUST_COEFFICIENT, solver.MAX_ITER) == (224, 0.001, 0)
    warmup = warmup_steps(
        1_281_167,
        batch_size=solver.BATCH_SIZE,
        iterations=solver.WARMUP_ITERS,
        epochs=solver.WARMUP_EPOCHS,
    )
    epochs = PAPERS[name]["length"].get("WARMUP_EPOCHS", 10 if solver.OPTIMIZER == "lars" else 0)
    assert warmup == math.ceil(epochs * 1_281_167 / solver.BATCH_SIZE)


def test_a_runs_learning_rates_are_the_recipes_schedule(photographs, tmp_path):
    """Warm-up of two steps to 0.2, then half a cosine over the other four; or two drops."""
    cosine = [0.1 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    expected = {"simclr": [0.1, 0.2, *cosine], "end-to-end": [0.1, 0.2, 0.2, 0.2, 0.02, 0.002]}
    for name, rates in expected.items():
        train(tiny.recipe(name, photographs, tmp_path / name), quiet=True)
        records = map(json.loads, (tmp_path / name / "metrics.json").open())
        assert [record["lr"] for record in records] == pytest.approx(rates)


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
        *((name, "INPUT.SMALL_CROPS", 2) for name in METHODS if name != "swav"),
    ],
)
def test_an_impossible_setting_names_its_key(method, key, value):
    with pytest.raises(UserError, match=re.escape(key)):
        tiny.build(method, key, value)

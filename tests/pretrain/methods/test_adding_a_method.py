"""The example of docs/adding-a-method.md, taken from there and trained."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import torch
from lightly.loss import NegativeCosineSimilarity

from moco_det import convert
from pretrain import methods
from pretrain.checkpoint import format as checkpoint
from pretrain.config.defaults import load_config
from pretrain.engine.train_loop import train
from pretrain.methods.base import Run
from tests.pretrain import tiny
from tests.pretrain.ranks import on_ranks

PAGE = (Path(__file__).parents[3] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
CODE, RECIPE = (re.search(rf"```{kind}\n(.+?)```", PAGE, re.S)[1] for kind in ("python", "yaml"))


def example():
    names = {"__name__": "simsiam"}
    exec(compile(CODE, "docs/adding-a-method.md", "exec"), names)
    return names


def test_the_example_is_short_and_its_loss_is_the_papers():
    assert len(CODE.splitlines()) <= 60
    torch.manual_seed(0)
    cfg = tiny.config("simsiam")
    method = example()["build_simsiam"](cfg, Run(tiny.IMAGES, tiny.STEPS, 1)).double().train()
    views = tiny.views("simsiam", 0)
    loss = method(views, 0, tiny.index(0))["loss"]
    z1, z2 = (method.encoder_q(view) for view in views)
    p1, p2 = method.predictor(z1), method.predictor(z2)
    distance = NegativeCosineSimilarity()
    expected = (distance(p1, z2.detach()) + distance(p2, z1.detach())) / 2
    torch.testing.assert_close(loss, 1 + expected)
    parameters = list(method.parameters())
    ours = torch.autograd.grad(loss, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_the_example_trains_by_its_recipe_once_it_is_registered(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "simsiam", example()["build_simsiam"])
    rng = np.random.default_rng(0)
    for i in range(8):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    recipe = tmp_path / "simsiam.yaml"
    recipe.write_text(RECIPE)
    small = (
        "MODEL.DEPTH 18 MODEL.WIDTH 0.0625 INPUT.CROP_SIZE 32 SOLVER.BATCH_SIZE 8 "
        "SOLVER.MAX_ITER 2 LOG.PERIOD 1 DATALOADER.NUM_WORKERS 0 CHECKPOINT.PERIOD 1"
    )
    cfg = load_config(str(recipe), small.split())
    run, broken = tmp_path / "run", tmp_path / "broken"
    cfg.DATA, cfg.OUTPUT_DIR = [str(tmp_path)], str(run)
    train(cfg, quiet=True)
    lines = [json.loads(line) for line in (run / "metrics.json").open()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(0 <= line["loss"] <= 2 for line in lines)
    state = checkpoint.load(run / checkpoint.LAST)["state_dict"]
    assert state["predictor.0.weight"].shape == (8, 32)

    broken.mkdir()
    shutil.copy(run / "checkpoint_00000001.pth", broken / checkpoint.LAST)
    cfg.OUTPUT_DIR = str(broken)
    train(cfg, resume=True, quiet=True)
    again = checkpoint.load(broken / checkpoint.LAST)["state_dict"]
    assert all(torch.equal(state[name], value) for name, value in again.items())
    assert convert(run / checkpoint.LAST, "torchvision", output=tmp_path / "w.pth").report


def steps_of_the_example():
    methods.METHODS["simsiam"] = example()["build_simsiam"]
    settings = (("MODEL.BN_GROUPS", 2), ("MODEL.SYNC_BN", True))
    return [tiny.steps("simsiam", *overrides) for overrides in settings]


def test_two_processes_take_the_examples_steps_of_one():
    (alone,) = on_ranks(1, steps_of_the_example)
    for rank, results in enumerate(on_ranks(2, steps_of_the_example)):
        for result, expected in zip(results, alone, strict=True):
            wanted = expected if rank == 0 else expected | {"state": {}}
            torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-8)

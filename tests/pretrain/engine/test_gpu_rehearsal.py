"""The train step of every method on a GPU that is not there: no device is mixed, nothing waits."""

import numpy as np
import pytest
import torch

from moco_common import comm
from moco_common.stopping import StopRequest
from pretrain.data.loader import Batch
from pretrain.data.stateless_random import uniform
from pretrain.data.transforms.gpu_ops import collect
from pretrain.data.transforms.recipes import build_recipes, draw
from pretrain.engine.metrics import Scalars
from pretrain.engine.train_step import TrainStep
from pretrain.methods import METHODS, build_method
from pretrain.solver.optimizers import build_optimizer
from tests.fake_gpu import rehearsal, to_gpu
from tests.pretrain.tiny import config

STEPS, SHARE = 2, 4


def batch(recipes, step, on_device):
    """One rank's share as the loader's workers make it."""
    views = [torch.zeros(SHARE, r.crop_size, r.crop_size, 3, dtype=torch.uint8) for r in recipes]
    numbers = [iter(row).__next__ for row in uniform(200, step, np.arange(SHARE)).tolist()]
    drawn = [[draw(recipe, 40, 40, random) for random in numbers] for recipe in recipes]
    pending = [collect(parameters) if on_device else None for parameters in drawn]
    index = torch.arange(SHARE)
    views = [view.permute(0, 3, 1, 2) for view in views]
    return Batch(views, index, torch.zeros(len(views), SHARE, 5), pending=pending)


def walk(method, world, precision="float32", on_device=False, *overrides):
    """The steps between two log lines on rank 0 of ``world``; return the mode that watched them."""
    small = ["INPUT.CROP_SIZE", 32, "INPUT.SMALL_CROP_SIZE", 16, "INPUT.ON_DEVICE", on_device]
    small += ["INPUT.SMALL_CROPS", 2] if method == "swav" else []
    cfg = config(method, "SOLVER.BATCH_SIZE", SHARE * world, *small, *overrides)
    with rehearsal(world) as gpu:
        built = build_method(cfg, num_images=20 + SHARE * world, total_steps=10).train()
        take = TrainStep(
            to_gpu(built), build_optimizer(cfg, built), total_steps=10, precision=precision
        )
        scalars, request = Scalars(), StopRequest()
        recipes = build_recipes(cfg)[: built.num_views]
        gpu.waits.clear()
        gpu.collectives.clear()
        for step in range(STEPS):
            ready = batch(recipes, step, on_device).pin_memory()
            views = ready.to(comm.device())
            scalars.add(take(views, ready.index, step, 0.1, ready.places))
            request.agreed()
    return gpu


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize(
    ("precision", "on_device"), [("float32", False), ("bfloat16", True)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("method", METHODS)
def test_no_step_mixes_devices_or_waits_for_the_gpu(method, precision, on_device, world):
    bn = ("MODEL.SYNC_BN", precision == "bfloat16")
    assert dict(walk(method, world, precision, on_device, *bn).waits) == {}

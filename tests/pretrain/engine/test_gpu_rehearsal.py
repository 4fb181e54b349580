"""The train step of every method on a GPU that is not there: no device is mixed, nothing waits."""

from collections import Counter
from functools import cache

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
from tests.pretrain.tiny import CLASSES, config

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


@cache
def walk(method, world, precision="float32", on_device=False, *overrides):
    """The steps between two log lines on rank 0 of ``world``; return the mode that watched them."""
    small = ["INPUT.CROP_SIZE", 32, "INPUT.SMALL_CROP_SIZE", 16, "INPUT.ON_DEVICE", on_device]
    small += ["INPUT.SMALL_CROPS", 2] if method == "swav" else []
    cfg = config(method, "SOLVER.BATCH_SIZE", SHARE * world, *small, *overrides)
    images = 20 + SHARE * world
    labels = np.arange(images, dtype=np.int32) % CLASSES
    with rehearsal(world) as gpu:
        built = build_method(cfg, num_images=images, total_steps=10, labels=labels).train()
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


def expected(method, world):
    """Calls and bytes that a rank passes to the collectives of a step, as docs/scaling-out.md has
    them: n images on each of W ranks, C numbers in an embedding, P prototypes."""
    n, c, p, side = SHARE, 8, 12, 32
    hidden, slots = 16, 6  # of slot-con
    keys, images, vote = 4 * n * c, 3 * n * side**2, [("allreduce_", 8)]
    shuffle = [("alltoall_base_", images), ("alltoall_base_", keys)]
    gather = [("allgather_", keys)]
    return Counter(
        vote
        + {
            "moco": shuffle + gather,
            "end-to-end": [*shuffle, *gather]
            + [("alltoall_base_", world * keys), ("alltoall_base_", keys)],  # backward
            "memory-bank": [*gather, ("allgather_", 8 * n), ("allreduce_", world * keys)]
            + [("allgather_", 8 * world * n)]
            + [("alltoall_base_", 8 * world**2 * n), ("alltoall_base_", world * keys)],
            "simclr": [("allgather_", 2 * keys), ("alltoall_base_", 2 * world * keys)],
            "dense-cl": [*shuffle, *gather, *gather, ("alltoall_base_", keys)]
            + [("alltoall_base_", 4 * n * 32)],  # a map of one cell and 32 channels
            "slot-con": [("allreduce_", size) for size in 2 * (4, 4, 8, 8)]  # valid rows and images
            + [("allreduce_", 4 * slots)]
            + [("allgather_", 4 * hidden), ("alltoall_base_", world * 4 * hidden)] * 8
            + [("allgather_", keys), ("allgather_", n)] * 2,  # of slots, one in a map of one cell
            "swav": [("allreduce_", 2 * 4 * p)] * 3 + [("allgather_", 2 * keys)],
        }.get(method, [])
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_collectives_of_a_step_are_those_of_the_page_on_scaling(method):
    found = Counter(
        (name, size)
        for name, sizes in walk(method, 8, "float32", False).collectives.items()
        for size in sizes
    )
    assert {key: count / STEPS for key, count in found.items()} == expected(method, 8)


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize(
    ("precision", "on_device"), [("float32", False), ("bfloat16", True)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("method", METHODS)
def test_no_step_mixes_devices_or_waits_for_the_gpu(method, precision, on_device, world):
    bn = ("MODEL.SYNC_BN", True) if precision == "bfloat16" else ()
    assert dict(walk(method, world, precision, on_device, *bn).waits) == {}


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_times_its_algorithms_unless_deterministic_ones_are_wanted(
    monkeypatch, deterministic
):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)  # the opposite
    walk.__wrapped__("moco", 1)
    assert torch.backends.cudnn.benchmark is not deterministic

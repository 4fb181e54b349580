"""Comparison of a GPU with the CPU: every method, every precision, resuming, ranks, learning."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moco_common import comm
from moco_common.launch import launch
from pretrain.checkpoint import format as checkpoint
from pretrain.config.defaults import get_defaults
from pretrain.data.transforms.gpu_ops import collect, finish
from pretrain.data.transforms.recipes import draw, render, view_recipes
from pretrain.engine.train_step import TrainStep
from pretrain.methods import METHODS, build_method
from pretrain.solver.optimizers import build_optimizer

Found = tuple[str, str, bool | None]
BATCH, IMAGES, CLASSES = 16, 64, 4


def equality(device: torch.device, tiny: bool, seconds: float, folder: Path) -> Iterator[Found]:
    """Compare the losses of twenty steps with those of float64 on the CPU, for every method."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    steps = 3 if tiny else 20
    cpu = torch.device("cpu")
    for method in METHODS:
        exact, rounded = (losses(method, cpu, d, steps) for d in (torch.float64, torch.float32))
        found = losses(method, device, torch.float32, steps)
        most, usual = (float((x.double() - exact).abs().max()) for x in (found, rounded))
        # The rounding of one device is a measure of that of another.
        text = f"{most:.1e} from float64 (float32 on the CPU: {usual:.1e})"
        yield f"{method}: {steps} steps in float32", text, most <= max(1e-3, 20 * usual)
    recipes = view_recipes("byol", crop_size=32, on_device=True)
    yield ("views finished on the device", *_compare_views(recipes, device))


def losses(
    method: str, device: torch.device, dtype: torch.dtype, steps: int, precision: str = "float32"
) -> Tensor:
    """Return the loss of each step of a small network, whose start and images are the same on every
    device."""
    comm.leave_gpus(device.type == "cpu")
    cfg = get_defaults()
    cfg.MODEL.BN_GROUPS, cfg.MOCO.QUEUE_SIZE = 2, 96  # in place of "auto"
    cfg.merge_from_list(
        ["METHOD", method, "MODEL.DEPTH", 18, "MODEL.WIDTH", 0.125]
        + ["MOCO.DIM", 16, "BANK.NEGATIVES", 32, "SIMCLR.DIM", 16]
        + ["BYOL.HIDDEN", 32, "BYOL.DIM", 16, "SWAV.HIDDEN", 32, "SWAV.DIM", 16]
        + ["SWAV.PROTOTYPES", 24, "SWAV.QUEUE_SIZE", 32, "SOLVER.BATCH_SIZE", BATCH]
        + ["SUPERVISED.CLASSES", CLASSES]
    )
    torch.manual_seed(0)
    labels = np.arange(IMAGES) % CLASSES
    built = build_method(cfg, num_images=IMAGES, total_steps=100, labels=labels)
    built.train().to(device, dtype)
    take = TrainStep(built, build_optimizer(cfg, built), total_steps=100, precision=precision)
    result = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        shape = (built.num_views or 2, BATCH, 3, 32, 32)
        views = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        index = torch.arange(step * BATCH, (step + 1) * BATCH) % IMAGES
        places = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).expand(shape[0], BATCH, 5)
        result.append(take(list(views), index, step, 0.01, places.contiguous())["loss"].cpu())
    return torch.stack(result)


def _compare_views(recipes: list, device: torch.device) -> tuple[str, bool]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
    drawn = [draw(recipes[i % 2], 48, 48, rng.random) for i in range(64)]
    whole = np.stack([render(image, parameters) for parameters in drawn])
    cropped = np.stack([render(image, parameters.geometry) for parameters in drawn])
    views = finish(torch.from_numpy(cropped).permute(0, 3, 1, 2).to(device), collect(drawn))
    far = np.abs(views.permute(0, 2, 3, 1).cpu().numpy().astype(int) - whole)
    share = float((far > 3).mean())
    return f"{share:.2%} of the values differ by more than 3 of 255", share < 0.02


def precision_and_resume(
    device: torch.device, tiny: bool, seconds: float, folder: Path
) -> Iterator[Found]:
    """Train at every precision; kill a run, resume it, and compare it with one that was whole."""
    yield from _resume(device, tiny, folder)
    steps = 3 if tiny else 30
    exact = losses("moco", device, torch.float32, 1)[0]
    for precision in ("bfloat16", "float16"):
        found = losses("moco", device, torch.float32, steps, precision)
        usual = losses("moco", torch.device("cpu"), torch.float32, 1, precision)
        # Only the first loss is comparable: any rounding changes the following ones completely.
        far, as_usual = (abs(float(x[0] - exact)) for x in (found, usual))
        text = f"first loss {far:.1e} from float32 (on the CPU: {as_usual:.1e})"
        near = far <= 0.01 + 3 * as_usual
        yield f"moco in {precision}", text, near and bool(found.isfinite().all())


def _resume(device: torch.device, tiny: bool, folder: Path) -> Iterator[Found]:
    photographs = write_photographs(folder / "photographs", classes=2, each=16)
    total = 6 if tiny else 60
    settings = tiny_run(total) | {"CHECKPOINT.PERIOD": total // 3, "INPUT.ON_DEVICE": True}
    whole, killed = folder / "whole", folder / "killed"
    _train(photographs, whole, settings).wait()
    run = _train(photographs, killed, settings)
    while run.poll() is None and not checkpoint.candidates(killed):
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    _train(photographs, killed, settings, resume=True).wait()
    a, b = (checkpoint.load(path / checkpoint.LAST) for path in (whole, killed))
    kinds = {str(x.device) for x in a["state_dict"].values()}
    yield "a checkpoint is read on the CPU", ", ".join(kinds), kinds == {"cpu"}
    far = max(
        float((x.double() - b["state_dict"][name].double()).abs().max())
        for name, x in a["state_dict"].items()
        if x.numel()
    )
    # Not 0: a few operations have no deterministic kernel on a GPU.
    yield "killed and resumed, against the whole run", f"{far:.1e}", far < 1e-2


def tiny_run(total: int) -> dict[str, object]:
    """Settings of a run that takes seconds anywhere."""
    return {
        "MODEL.DEPTH": 18,
        "MODEL.WIDTH": 0.25,
        "MODEL.BN_GROUPS": 2,
        "INPUT.CROP_SIZE": 32,
        "MOCO.DIM": 32,
        "MOCO.QUEUE_SIZE": 64,
        "MOCO.MOMENTUM": 0.9,
        "SOLVER.BATCH_SIZE": 16,
        "SOLVER.BASE_LR": 0.05,
        "SOLVER.EPOCHS": 0,
        "SOLVER.MAX_ITER": total,
        "LOG.PERIOD": 1,
        "DATALOADER.NUM_WORKERS": 1,
    }


def _train(
    data: Path, out: Path, settings: dict[str, object], resume: bool = False
) -> subprocess.Popen[bytes]:
    """Start a run with deterministic algorithms: without them, two runs differ after few steps."""
    words = {"data": str(data), "output_dir": str(out), "settings": settings, "resume": resume}
    code = (
        "import torch; torch.use_deterministic_algorithms(True, warn_only=True); "
        f"from pretrain.api import train; train('moco-v2', quiet=True, **{words!r})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    )


def write_photographs(folder: Path, *, classes: int, each: int, side: int = 64) -> Path:
    """Write images of gratings, one direction a class, in random colours and phases."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        angle = math.pi * c / classes
        along = x * math.cos(angle) + y * math.sin(angle)
        for i in range(each):
            wave = np.sin(2 * math.pi * (rng.uniform(4, 8) * along + rng.random()))
            colours = rng.integers(0, 256, (2, 3))
            mixed = (wave[..., None] + 1) / 2
            image = colours[0] * mixed + colours[1] * (1 - mixed)
            image += rng.normal(0, 8, image.shape)
            name = folder / f"class{c}" / f"{i:04d}.jpg"
            cv2.imwrite(str(name), np.clip(image, 0, 255).astype(np.uint8))
    return folder


def processes(device: torch.device, tiny: bool, seconds: float, folder: Path) -> Iterator[Found]:
    """Exchange tensors between ranks: two over gloo, and one on every GPU over NCCL."""
    launch(_exchange, 2, folder, on_gpu=False)
    yield "two ranks over gloo", "sums, rows and gradients arrive", True
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        launch(_exchange, gpus, folder, on_gpu=True)
        yield f"{gpus} rank(s) over NCCL", "sums, rows and gradients arrive", True


def _exchange(folder: Path) -> None:
    from pretrain import distributed

    world, rank, device = comm.world_size(), comm.rank(), comm.device()
    x = torch.full((2, 3), float(rank), device=device, requires_grad=True)
    everyone = comm.all_gather(x)
    expected = torch.arange(world, device=device).repeat_interleave(2).float()
    assert torch.equal(everyone[:, 0], expected), everyone
    everyone.sum().backward()
    assert x.grad is not None
    assert (x.grad == world).all()
    order = torch.arange(2 * world).roll(1)
    assert torch.equal(distributed.permute_batch(x, order)[0], expected[order[2 * rank]].expand(3))
    assert comm.maximum(rank) == world - 1
    if world > 1:
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        assert total.item() == world
    comm.barrier()


def learning(device: torch.device, tiny: bool, seconds: float, folder: Path) -> Iterator[Found]:
    """Pre-train for the time that is left; the kNN accuracy rises."""
    photographs = write_photographs(folder / "photographs", classes=4, each=8 if tiny else 200)
    total = 4 if tiny else 600
    settings = tiny_run(total) | {"PROBE.DATA": str(photographs), "LOG.PERIOD": max(1, total // 4)}
    settings |= {"SOLVER.BATCH_SIZE": 16 if tiny else 128, "PROBE.PERIOD_EPOCHS": 1.0}
    settings["CHECKPOINT.PERIOD"] = total
    code = _train(photographs, folder / "run", settings).wait()
    lines = [json.loads(x) for x in (folder / "run/metrics.json").read_text().splitlines()]
    accuracy = [line["knn_top1"] for line in lines if "knn_top1" in line]
    text = " -> ".join(f"{x:.1f}" for x in (accuracy[0], accuracy[-1])) + "% (chance 25%)"
    yield "kNN accuracy of a run", text, code == 0 and (tiny or accuracy[-1] > 40)

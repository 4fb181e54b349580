"""Speed of the MoCo v2 step, of the loader and of the batch norms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moco_common import comm
from moco_common.hardware import cpu_count
from pretrain.config.defaults import load_config
from pretrain.doctor.machine import decoding, photograph
from pretrain.engine.train_step import TrainStep
from pretrain.methods import build_method
from pretrain.methods.moco import MoCo
from pretrain.solver.optimizers import build_optimizer

Found = tuple[str, str, bool | None]
VARIANTS = {  # precision, TF32, compiled, channels_last
    "float32": ("float32", False, False, True),
    "TF32": ("float32", True, False, True),
    "bfloat16": ("bfloat16", True, False, True),
    "bfloat16, contiguous": ("bfloat16", True, False, False),
    "bfloat16, compiled": ("bfloat16", True, True, True),
}


def step(device: torch.device, tiny: bool, seconds: float, folder: Path) -> Iterator[Found]:
    """Time the step of a ResNet-50 at 224 px, batch 256, and the encoders alone in it."""
    words = ["MODEL.DEPTH", "18", "MODEL.WIDTH", "0.0625", "INPUT.CROP_SIZE", "32"]
    words += ["MOCO.QUEUE_SIZE", "64", "SOLVER.BATCH_SIZE", "8"]
    cfg = load_config("moco-v2", words if tiny else [])
    size, side = cfg.SOLVER.BATCH_SIZE, cfg.INPUT.CROP_SIZE
    views = [
        torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
        for _ in range(2)
    ]
    index = torch.arange(size)
    end = time.monotonic() + 0.9 * seconds
    for i, (name, (precision, tf32, compiled, last)) in enumerate(VARIANTS.items()):
        if tiny and (compiled or i > 2):
            break
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        layout = torch.channels_last if last else torch.contiguous_format
        torch.manual_seed(0)
        method = build_method(cfg, num_images=10**6, total_steps=10**6).to(device).train()
        assert isinstance(method, MoCo)
        method.to(memory_format=layout)
        take = TrainStep(
            method,
            build_optimizer(cfg, method),
            total_steps=10**6,
            precision=precision,
            compile=compiled,
        )
        inputs = [view.contiguous(memory_format=layout) for view in views]
        run = lambda: take(inputs, index, 1, 1e-3)  # noqa: B023, E731
        alone = lambda: _encoders(method, inputs)  # noqa: B023, E731
        budget = max(0.5, (end - time.monotonic()) / (len(VARIANTS) - i) / 4)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        whole, limit = rate(run, size, budget, device), rate(alone, size, budget, device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        text = f"{whole:.0f} images/s, {whole / limit:.0%} of the encoders alone"
        yield f"step in {name}", f"{text}, {peak:.1f} GiB", None
        yield f"idle share in {name}", f"{_idle(run, device):.1%}", None


def _encoders(method: MoCo, views: list[Tensor]) -> None:
    """Both encoders, one of them with its backward pass: a limit for every such step."""
    with torch.no_grad():
        method.encoder_k(views[1])
    method.zero_grad(set_to_none=True)
    method.encoder_q(views[0]).square().sum().backward()


def rate(run: Callable[[], object], images: int, seconds: float, device: torch.device) -> float:
    """Return the images per second of ``run``, after three calls to warm up."""
    for _ in range(3):
        run()
    _wait(device)
    start, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - start < seconds:
        run()
        calls += 1
        if calls % 5 == 0:  # else a GPU would be asked for many steps more than fit
            _wait(device)
    _wait(device)
    return images * calls / (time.perf_counter() - start)


def _idle(run: Callable[[], object], device: torch.device, steps: int = 3) -> float:
    """Return the share of the time in which the device has no kernel to run; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        run()
    _wait(device)
    wall = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(steps):
            run()
        _wait(device)
    busy = sum(float(event.self_device_time_total) for event in traced.key_averages()) / 1e6
    return max(0.0, 1.0 - busy / wall)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def data(device: torch.device, tiny: bool, seconds: float, folder: Path) -> Iterator[Found]:
    """Time views on a core, decoding on the GPU, and the batch norms to choose from."""
    found = decoding(cpu_count(), seconds=0.2 if tiny else 2.0)
    yield found.what, found.found, None
    if device.type == "cuda":
        from torchvision.io import decode_jpeg  # type: ignore[import-untyped]

        encoded = [torch.frombuffer(bytearray(photograph()), dtype=torch.uint8)] * 64
        run = lambda: decode_jpeg(encoded, device=device)  # noqa: E731
        yield "decoding on the GPU", f"{rate(run, 64, 2.0, device):.0f} images/s", None
    yield from _norms(device, tiny)


def _norms(device: torch.device, tiny: bool) -> Iterator[Found]:
    from moco_common.sync_batch_norm import SyncBatchNorm
    from pretrain.modeling.batch_norm import SplitBatchNorm2d

    comm.leave_gpus(device.type == "cpu")
    shape = (16, 16, 8, 8) if tiny else (256, 64, 56, 56)
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    layers = {
        "plain": torch.nn.BatchNorm2d(shape[1]),
        "8 groups": SplitBatchNorm2d(shape[1], groups=8),
        "synchronised": SyncBatchNorm(shape[1]),
    }
    for name, layer in layers.items():
        layer.to(device).train()
        run = lambda: layer(x.requires_grad_()).sum().backward()  # noqa: B023, E731
        milliseconds = 1e3 * shape[0] / rate(run, shape[0], 0.1 if tiny else 1.0, device)
        yield f"batch norm, {name}, forward and backward", f"{milliseconds:.2f} ms", None

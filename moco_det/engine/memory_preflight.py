"""Memory check before a run: whether its worst batch fits, and with which settings it would."""

import random
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from moco_common.text import counted
from moco_det.data.dataset_mapper import build_train_mapper
from moco_det.data.samplers import (
    PREFLIGHT,
    Batch,
    TrainingSet,
    load_training_set,
    seed_model,
    share,
)
from moco_det.engine.train_step import forward_backward, precision
from moco_det.modeling.batch_norm import norms_apart

HEADROOM = 0.95  # usable share of the memory: allocators and libraries round up


class GPUMemory:
    """Memory allocated by torch on the current GPU."""

    def reset(self) -> None:
        """Reset the peak."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Return the peak since `reset`, in bytes."""
        return float(torch.cuda.max_memory_allocated())

    def limit(self) -> float:
        """Return the bytes available to this process: those it holds and those that are free."""
        free, _ = torch.cuda.mem_get_info()
        return float(free + torch.cuda.memory_reserved())


class CPUMemory:
    """Resident memory of this process."""

    def reset(self) -> None:
        """Reset the peak, where the system supports it."""
        with suppress(OSError):  # elsewhere the peak is that since the process started
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM on Linux

    def peak(self) -> float:
        """Return the peak since `reset`, in bytes."""
        status = _numbers("/proc/self/status")
        if "VmHWM" in status:
            return status["VmHWM"] * 1024.0
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    def limit(self) -> float:
        """Return the bytes available to this process: its own and its share of the free ones."""
        free = [_numbers("/proc/meminfo").get("MemAvailable", float("inf")) * 1024]
        for most, used in (  # cgroup v2, v1
            ("memory.max", "memory.current"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
        ):
            try:
                free.append(
                    float(Path("/sys/fs/cgroup", most).read_text())
                    - float(Path("/sys/fs/cgroup", used).read_text())
                )
            except (OSError, ValueError):
                continue  # no such cgroup, or no limit ("max")
        share = min(free) / (comm.get_local_size() if comm.get_world_size() > 1 else 1)
        return _numbers("/proc/self/status").get("VmRSS", 0) * 1024.0 + share


def _numbers(path: str) -> dict[str, int]:
    """Parse the ``Name:  123 kB`` lines of a file in /proc; return {} if there is no such file."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {
        words[0].rstrip(":"): int(words[1])
        for words in lines
        if len(words) > 1 and words[1].isdigit()
    }


def agree(value: float, operation: Any) -> float:
    """Reduce a value over all processes with a ``dist.ReduceOp``."""
    if comm.get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == dist.Backend.NCCL else "cpu"
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=operation)
    return float(tensor.item())


def in_gb(count: float) -> str:
    """Format a number of bytes, such as ``"1.3 GB"``."""
    return f"{count / 1e9:.1f} GB" if count < float("inf") else "more than all"


@dataclass(frozen=True)
class Report:
    """The memory that the worst batch needs.

    Attributes:
        size: width and height of its images in pixels, after padding.
        objects: number of annotated objects in each image.
        images: images per pass, as configured.
        needed: images per pass -> peak bytes of a process, optimizer included; measured, or
            extrapolated linearly.
        limit: bytes available to a process.
        batch: images per optimisation step, over all processes and passes.
        world_size: number of processes.
    """

    size: tuple[int, int]
    objects: int
    images: int
    needed: dict[int, float]
    limit: float
    batch: int
    world_size: int

    @property
    def fits(self) -> bool:
        """True if a pass fits as configured."""
        return self._fits(self.images)

    def _fits(self, images: int) -> bool:
        return self.needed[images] <= HEADROOM * self.limit

    @property
    def passes(self) -> int | None:
        """The fewest ``SOLVER.ACCUMULATION_STEPS`` with which the batch fits; None if none does."""
        for images in sorted(self.needed, reverse=True):
            if self.batch % (images * self.world_size) == 0 and self._fits(images):
                return self.batch // (images * self.world_size)
        return None

    def __str__(self) -> str:
        width, height = self.size
        text = (
            f"the worst pass ({counted(self.images, 'image')} of {width}x{height} pixels with "
            f"{counted(self.objects, 'object')} each) needs "
            f"{in_gb(self.needed[self.images])} of {in_gb(self.limit)}"
        )
        if self.passes is None:
            return text + (
                "; not even one image per pass fits: lower INPUT.MIN_SIZE_TRAIN and "
                "INPUT.MAX_SIZE_TRAIN, or set SOLVER.AMP.ENABLED True on a GPU"
            )
        least = f"SOLVER.ACCUMULATION_STEPS {self.passes}"
        if not self.fits:
            return f"{text}; {least} fits, with SOLVER.IMS_PER_BATCH {self.batch} unchanged"
        now = self.batch // (self.images * self.world_size)
        return text + (f"; {least} fits as well, and is faster" if self.passes < now else ": fits")


def preflight(
    cfg: CfgNode,
    model: nn.Module,
    training_set: TrainingSet | None = None,
) -> Report:
    """Measure the memory of forward and backward on the largest images with the most objects.

    One image is tried first, then two, then a whole pass if it is expected to fit. Weights,
    gradients, buffers, modes and random states are restored bit for bit. All ranks must call this.

    Args:
        cfg: the config of the run, whose data sets are registered.
        model: the loaded model on its device, not wrapped in DDP.
        training_set: the images, if already loaded.
    """
    world_size = comm.get_world_size()
    images, batch = share(cfg, world_size), cfg.SOLVER.IMS_PER_BATCH
    training_set = training_set or load_training_set(cfg)
    memory = GPUMemory() if next(model.parameters()).is_cuda else CPUMemory()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    later = parameters * (2 if world_size > 1 else 1)  # momentum, and DDP's copy of the gradients
    start = memory.peak()
    limit = agree(memory.limit(), dist.ReduceOp.MIN)
    measured: dict[int, float] = {}
    # Where one process runs out of memory, the others would wait for its statistics forever.
    with _untouched(model), norms_apart(model):
        size, objects, item = _worst_image(cfg, training_set)
        for count in sorted({1, min(2, images), images}):
            if count > 2 and _line(measured, start)(count) + later > HEADROOM * limit:
                break
            peak = _peak_of(model, [item] * count, cfg, memory)
            measured[count] = agree(peak, dist.ReduceOp.MAX)
    line = _line(measured, start)
    top = batch // world_size
    needed = {n: measured.get(n, line(n)) + later for n in range(1, top + 1)}
    return Report(size, objects, images, needed, limit, batch, world_size)


def _peak_of(model: nn.Module, batch: Batch, cfg: CfgNode, memory: CPUMemory | GPUMemory) -> float:
    seed_model(cfg.SEED, PREFLIGHT, len(batch))
    memory.reset()
    try:
        with EventStorage():
            forward_backward(model, batch, precision(cfg))
        return memory.peak()
    except torch.cuda.OutOfMemoryError:
        return float("inf")
    finally:
        model.zero_grad(set_to_none=True)


def _line(measured: dict[int, float], start: float) -> Callable[[int], float]:
    """Return memory as a linear function of the images per pass, from the extremes measured."""
    finite = {images: peak for images, peak in measured.items() if peak < float("inf")}
    if not finite:
        return lambda images: float("inf")
    fewest, most = min(finite), max(finite)
    slope = finite[fewest] - start
    if most > fewest and finite[most] > finite[fewest]:
        slope = (finite[most] - finite[fewest]) / (most - fewest)
    return lambda images: finite[most] + slope * (images - most)


def _worst_image(
    cfg: CfgNode, training_set: TrainingSet
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Return size, number of objects and mapped image with the most objects, padded to the largest
    canvas that a batch can have."""
    largest = cfg.clone()
    largest.defrost()
    largest.INPUT.MIN_SIZE_TRAIN = (max(cfg.INPUT.MIN_SIZE_TRAIN),)
    largest.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    index = int(training_set.objects.argmax())
    seed_model(cfg.SEED, PREFLIGHT, 0)
    item = build_train_mapper(largest)(training_set.images[index])
    own_height, own_width = item["image"].shape[1:]
    width, height = _canvas(cfg, training_set)
    if (own_width > own_height) != (width > height):  # landscape and portrait take the same memory
        width, height = height, width
    right, below = max(0, width - own_width), max(0, height - own_height)
    item["image"] = F.pad(item["image"], (0, right, 0, below))
    if "sem_seg" in item:
        item["sem_seg"] = F.pad(
            item["sem_seg"], (0, right, 0, below), value=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        )
    height, width = item["image"].shape[1:]
    return (width, height), int(training_set.objects[index]), item


def _canvas(cfg: CfgNode, training_set: TrainingSet) -> tuple[int, int]:
    """Return width and height of the largest padded batch."""
    if cfg.INPUT.JITTER_SIZE:
        return cfg.INPUT.JITTER_SIZE, cfg.INPUT.JITTER_SIZE
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE == "absolute":
        height, width = cfg.INPUT.CROP.SIZE
        return int(width), int(height)
    short, long = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    if training_set.sizes is None:
        return long, long
    sizes = training_set.sizes.astype(float)
    scale = np.minimum(short / sizes.min(1), long / sizes.max(1)) if short else np.ones(len(sizes))
    scaled = np.rint(sizes * scale[:, None]).astype(int)
    groups = training_set.groups
    candidates = [scaled[groups == group].max(0) for group in np.unique(groups)]
    width, height = max(candidates, key=lambda size: size[0] * size[1])
    return int(width), int(height)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Restore a model's buffers, gradients and modes, and all random states, on exit."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    states = random.getstate(), np.random.get_state()
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    model.train()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        if devices:
            torch.cuda.empty_cache()

"""Checks of the machine: cores, memory, disk, and decoding speed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from moco_common.hardware import memory_limit
from pretrain.data.decoding import decode
from pretrain.data.transforms.recipes import draw, render, view_recipes

OK, WARNING, FAILURE = "ok", "warning", "failure"
CHECKPOINT_BYTES = 319e6  # ResNet-50: two encoders, the optimiser, a queue of 65,536 keys


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        what: name of what was checked, a few words.
        state: "ok", "warning" (usable with limits) or "failure" (unusable).
        found: what was found.
        advice: what to do; "" if nothing.
    """

    what: str
    state: str
    found: str
    advice: str = ""


def cores(count: int, gpus: int) -> Iterable[Finding]:
    """Check the cores: eight per GPU supply a ResNet-50 in mixed precision with images."""
    threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{count} usable" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    if gpus and count < 4 * gpus:
        yield Finding(
            "CPU cores",
            WARNING,
            f"{found}, {count / gpus:.1f} per GPU",
            "the GPUs will wait for data: set INPUT.ON_DEVICE True to move colour and blur to "
            f"them, and DATALOADER.NUM_WORKERS {max(1, count // gpus)} to use all cores.",
        )
    else:
        share = f", {count / gpus:.1f} per GPU" if gpus else ""
        yield Finding("CPU cores", OK, found + share)


def memory() -> Iterable[Finding]:
    """Check the memory available to this process, and the shared memory used by workers."""
    total, where = memory_limit()
    state = OK if total >= 8 * 2**30 else WARNING
    yield Finding(
        "memory",
        state,
        f"{total / 2**30:.1f} GiB{where}",
        "" if state == OK else "lower SOLVER.BATCH_SIZE and DATALOADER.NUM_WORKERS.",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = free < 2**30
        yield Finding(
            "shared memory",
            WARNING if small else OK,
            f"{free / 2**30:.1f} GiB in /dev/shm",
            "data-loader workers need more: start a container with --shm-size 8g." if small else "",
        )


def disk(folder: Path, megabytes: int = 64) -> Iterable[Finding]:
    """Check the disk space for checkpoints, and the speed of writing one."""
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = 4 * CHECKPOINT_BYTES
    yield Finding(
        "disk space",
        OK if free > needed else WARNING,
        f"{free / 1e9:.1f} GB free",
        ""
        if free > needed
        else f"a ResNet-50 run keeps up to {needed / 1e9:.1f} GB of checkpoints: free some space "
        "or choose another --output-dir.",
    )
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = megabytes * 2**20 / (time.perf_counter() - start)
    except OSError as error:
        yield Finding("disk speed", FAILURE, f"{error.strerror}", "choose another --output-dir.")
        return
    seconds = CHECKPOINT_BYTES / speed
    yield Finding(
        "disk speed",
        OK if seconds < 30 else WARNING,
        f"{speed / 1e6:.0f} MB/s with fsync: {seconds:.1f} s per ResNet-50 checkpoint, in the "
        "background",
        "" if seconds < 30 else "raise CHECKPOINT.PERIOD, or write to a faster disk.",
    )


def decoding(count: int, seconds: float = 1.0) -> Finding:
    """Measure the images per second for which one core makes two MoCo v2 views."""
    jpeg = photograph()
    recipes = view_recipes("moco-v2", crop_size=224, min_scale=0.2)
    outs = [np.empty((r.crop_size, r.crop_size, 3), np.uint8) for r in recipes]
    random = np.random.default_rng(0).random
    threads, done, start = cv2.getNumThreads(), 0, time.process_time()
    cv2.setNumThreads(1)
    try:
        while time.process_time() - start < seconds:
            pixels = decode(jpeg, min_side=224, min_area=recipes[0].min_area)
            height, width, _ = pixels.shape
            for recipe, out in zip(recipes, outs, strict=True):
                render(pixels, draw(recipe, height, width, random), out)
            done += 1
    finally:
        cv2.setNumThreads(threads)
    rate = done / (time.process_time() - start)
    return Finding(
        "views",
        OK,
        f"{rate:.0f} images/s per core, {rate * count:.0f} on all: two MoCo v2 views of 500x375",
        "a V100 consumes about 780 images/s in mixed precision (published).",
    )


def photograph() -> bytes:
    """Return a 500x375 JPEG of multi-scale noise, about as costly to decode as a photograph."""
    rng = np.random.default_rng(0)
    image = np.zeros((375, 500, 3), np.float32)
    for size in (4, 16, 64, 256):
        noise = rng.normal(0, 40, (size, size, 3)).astype(np.float32)
        image += cv2.resize(noise, (500, 375), interpolation=cv2.INTER_CUBIC)
    pixels = np.clip(image + 128, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()

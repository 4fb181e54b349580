"""Extraction of features with a frozen backbone, in batches, with a cache on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco_common.errors import UserError
from moco_common.files import read_json, replace_text, replacing
from moco_common.progress import Loop
from pretrain.modeling.resnet import ResNet
from pretrain.probe.backbone import digest, frozen
from pretrain.probe.datasets import LabelledImages, Preprocessing, read_batches

MAX_BAD_SHARE = 0.05  # largest tolerated share of unreadable images, as in pre-training
Say = Callable[[str], None]


@dataclass(frozen=True)
class Features:
    """Features and labels of the images that could be read.

    Attributes:
        values: (N, C) float32 on the CPU, as the backbone returns them; possibly memory-mapped.
        labels: (N,) int64, indices into ``classes``.
        classes: class names.
        skipped: one message for each image that could not be read.
        cached: True if the features were read from the cache.
    """

    values: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    cached: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: Tensor) -> Features:
        """Return the features of the given rows, (n,) int64, in their order."""
        return Features(self.values[rows], self.labels[rows], self.classes)


@torch.no_grad()
def stream_features(
    backbone: ResNet,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 256,
    threads: int = 1,
    rows: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Tensor, list[str]]]:
    """Yield features batch by batch; see `read_batches`.

    The backbone is used in its current mode: set evaluation mode before.

    Yields:
        The rows (n,) that could be read, their features, (n, C) float32 on the CPU, and one message
        for each image that could not be read.
    """
    device = next(backbone.parameters()).device
    for read, pixels, bad in read_batches(
        images, preprocessing, batch_size=batch_size, threads=threads, rows=rows
    ):
        if len(read) == 0:
            yield read, torch.zeros(0, backbone.num_features), bad
            continue
        pixels = pixels.to(device).contiguous(memory_format=torch.channels_last)
        yield read, backbone.forward_features(pixels).float().cpu(), bad


def extract(
    backbone: ResNet,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    name: str = "images",
    cache: ArrayCache | None = None,
    batch_size: int = 256,
    threads: int = 1,
    say: Say = print,
) -> Features:
    """Extract the features of all images, or read them from ``cache``.

    Cached features are used if the weights, the images (path, size, modification time), their
    classes and the preprocessing are unchanged.

    Args:
        name: name of this set of images, in the cache and in messages.
        cache: None to keep the features in memory only.

    Raises:
        UserError: more than `MAX_BAD_SHARE` of the images cannot be read.
        RuntimeError: the backbone changed during the extraction.
    """
    shape = (len(images), backbone.num_features)
    if cache is None:
        values = np.empty(shape, np.float32)
        with frozen(backbone):
            notes = _fill(values, backbone, images, preprocessing, name, batch_size, threads, say)
        return _features(values, notes, images, cached=False)
    looks = {**asdict(preprocessing), "decoding": "full"}
    key = {"weights": digest(backbone), "images": images.digest(), **looks}
    kept, notes, changed = cache.find(name, key)
    if kept is not None and kept.shape == shape:
        return _features(kept, notes, images, cached=True)
    if changed:
        say(f"cached features of {name} are out of date ({', '.join(changed)}): extracting again")
    # If the backbone changes meanwhile, nothing is stored under the wrong key.
    with cache.create(name, key, shape) as (values, kept_notes), frozen(backbone):
        kept_notes |= _fill(values, backbone, images, preprocessing, name, batch_size, threads, say)
    kept, notes, _ = cache.find(name, key)
    assert kept is not None
    return _features(kept, notes, images, cached=False)


def _fill(
    values: np.ndarray,
    backbone: ResNet,
    images: LabelledImages,
    preprocessing: Preprocessing,
    name: str,
    batch_size: int,
    threads: int,
    say: Say,
) -> dict[str, list[Any]]:
    """Fill ``values`` (N, C); return the rows that could not be read, and the reasons."""
    unread = np.ones(len(images), bool)
    skipped: list[str] = []
    total = len(images)
    with Loop(f"features of {name}", total, say) as loop:
        for rows, features, bad in stream_features(
            backbone, images, preprocessing, batch_size=batch_size, threads=threads
        ):
            values[rows], unread[rows] = features.numpy(), False
            skipped += bad
            done = int(total - unread.sum()) + len(skipped)
            if loop.at(done):
                loop.tell(f"{done}/{total}  {loop.rate:.0f} images/s")
    if len(skipped) > MAX_BAD_SHARE * len(images):
        raise UserError(
            f"{len(skipped)} of the {len(images)} {name} images cannot be read (first: "
            f"{skipped[0]}): fix or remove them."
        )
    return {"unread": np.flatnonzero(unread).tolist(), "skipped": skipped}


def _features(
    values: np.ndarray, notes: dict[str, list[Any]], images: LabelledImages, cached: bool
) -> Features:
    tensor, labels = torch.from_numpy(values), torch.from_numpy(images.labels)
    if notes["unread"]:  # only then are the values copied into memory
        read = torch.ones(len(labels), dtype=torch.bool)
        read[notes["unread"]] = False
        tensor, labels = tensor[read], labels[read]
    return Features(tensor, labels, images.classes, tuple(notes["skipped"]), cached)


class ArrayCache:
    """A cache of arrays: ``NAME.npy``, which is memory-mapped, and ``NAME.json``, its key.

    The key is written last and removed first, and each file is written atomically, so that an array
    is only found under the key it was computed for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(
        self, name: str, key: dict[str, Any]
    ) -> tuple[np.ndarray | None, dict[str, Any], list[str]]:
        """Return the array and the notes stored with it, if it was computed for this key.

        Returns:
            The array or None, its notes, and the parts of the key that have changed since it was
            written (empty if nothing was stored).
        """
        try:
            content = read_json(self.folder / f"{name}.json")
            old, notes = content["key"], content["notes"]
            changed = [part for part in key if old.get(part) != key[part]]
            if changed:
                return None, {}, changed
            array = np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="c")
        except FileNotFoundError:
            return None, {}, []
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, {}, ["damaged file"]
        return array, notes, []

    @contextmanager
    def create(
        self, name: str, key: dict[str, Any], shape: tuple[int, ...]
    ) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yield a float32 array and a dictionary of notes to fill.

        Both are stored if the block ends without an error.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        notes: dict[str, Any] = {}
        with replacing(self.folder / f"{name}.npy") as unfinished:
            array = np.lib.format.open_memmap(unfinished, "w+", dtype=np.float32, shape=shape)
            _allocate(unfinished)
            yield array, notes
            array.flush()
            (self.folder / f"{name}.json").unlink(missing_ok=True)
        replace_text(self.folder / f"{name}.json", json.dumps({"key": key, "notes": notes}))


def _allocate(path: Path) -> None:
    """Reserve the disk space of a sparse file: writing to a memory map on a full disk is SIGBUS."""
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # macOS lacks it
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)

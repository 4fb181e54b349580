"""Features of images under a frozen backbone: extracted once, in batches, kept on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco_common.errors import UserError
from moco_common.files import replace_text, replacing
from moco_common.progress import Loop
from pretrain.modeling.resnet import ResNet
from pretrain.probe.backbone import digest, frozen
from pretrain.probe.datasets import LabelledImages, Preprocessing, read_batches

MAX_BAD_SHARE = 0.05  # of unreadable images, as in pre-training
Say = Callable[[str], None]


@dataclass(frozen=True)
class Features:
    """Features and classes of the images that could be read.

    Attributes:
        values: (N, C) float32 on the CPU, as the backbone gives them; perhaps mapped from a file.
        labels: (N,) int64.
        classes: names.
        skipped: a line for each image that could not be read.
        cached: whether they came from the disk.
    """

    values: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    cached: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: Tensor) -> Features:
        """Those of some rows, (n,) int64, in their order."""
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
    """Rows (n,), their features (n, C) float32 on the CPU, and what could not be read, a batch at
    a time. The backbone is used as it is, so in evaluation mode if it was put there."""
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
    """Features of all images, from ``cache`` where they lie there and nothing has changed: neither
    the weights, nor an image (path, size, time of change) or its class, nor the preprocessing.

    Args:
        name: of this set of images, in the cache and in messages.
        cache: None to keep the features in memory.

    Raises:
        UserError: more than `MAX_BAD_SHARE` of the images cannot be read.
        RuntimeError: the backbone changed meanwhile.
    """
    shape = (len(images), backbone.num_features)
    if cache is None:
        values = np.empty(shape, np.float32)
        with frozen(backbone):
            notes = _fill(values, backbone, images, preprocessing, name, batch_size, threads, say)
        return _features(values, notes, images, cached=False)
    key = {"weights": digest(backbone), "images": images.digest(), **asdict(preprocessing)}
    kept, notes, changed = cache.find(name, key)
    if kept is not None and kept.shape == shape:
        return _features(kept, notes, images, cached=True)
    if changed:
        say(f"the stored features of {name} are stale ({', '.join(changed)}): extracted anew")
    # A backbone that changes meanwhile leaves nothing under a key that is not its own.
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
    """Fills (N, C) values; returns the rows that could not be read, and why."""
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
            f"{len(skipped)} of the {len(images)} {name} images cannot be read, the first is "
            f"{skipped[0]}: mend or remove them."
        )
    return {"unread": np.flatnonzero(unread).tolist(), "skipped": skipped}


def _features(
    values: np.ndarray, notes: dict[str, list[Any]], images: LabelledImages, cached: bool
) -> Features:
    tensor, labels = torch.from_numpy(values), torch.from_numpy(images.labels)
    if notes["unread"]:  # a copy in memory, only where some image is missing
        read = torch.ones(len(labels), dtype=torch.bool)
        read[notes["unread"]] = False
        tensor, labels = tensor[read], labels[read]
    return Features(tensor, labels, images.classes, tuple(notes["skipped"]), cached)


class ArrayCache:
    """Two files an array: ``NAME.npy``, read as a memory map, and ``NAME.json``, its key.

    The key is written last and removed first, each file appears whole or not at all, so an array
    is only ever found under the key that it was computed for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(
        self, name: str, key: dict[str, Any]
    ) -> tuple[np.ndarray | None, dict[str, Any], list[str]]:
        """The array and the notes kept with it, if it was computed for this very key.

        Returns:
            array (None if there is none), its notes, and the names of the parts of the key that
            changed since it was written (empty where nothing was there).
        """
        try:
            content = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            old, notes = content["key"], content["notes"]
            changed = [part for part in key if old.get(part) != key[part]]
            if changed:
                return None, {}, changed
            array = np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="c")
        except FileNotFoundError:
            return None, {}, []
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, {}, ["the file, which is damaged"]
        return array, notes, []

    @contextmanager
    def create(
        self, name: str, key: dict[str, Any], shape: tuple[int, ...]
    ) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """A float32 array to fill and a dictionary of notes to keep with it; both are kept when
        the block ends without an error."""
        self.folder.mkdir(parents=True, exist_ok=True)
        notes: dict[str, Any] = {}
        with replacing(self.folder / f"{name}.npy") as unfinished:
            array = np.lib.format.open_memmap(unfinished, "w+", dtype=np.float32, shape=shape)
            yield array, notes
            array.flush()
            (self.folder / f"{name}.json").unlink(missing_ok=True)
        replace_text(self.folder / f"{name}.json", json.dumps({"key": key, "notes": notes}))

"""Labelled images for probing: class folders, splits and preprocessing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco_common.errors import UserError
from moco_common.images import DecodeError
from moco_common.text import counted
from pretrain.data.decoding import decode
from pretrain.data.source_base import SPLITS, Source
from pretrain.data.sources import open_source


class LabelledImages(Source):
    """A subset of a source's images, each with a class.

    Args:
        source: the underlying source.
        rows: int64 (N,), indices of the images in the source.
        labels: int64 (N,), indices into ``classes``.
        classes: class names; test images share those of the training images.
    """

    labels: np.ndarray

    def __init__(
        self, source: Source, rows: np.ndarray, labels: np.ndarray, classes: Sequence[str]
    ) -> None:
        super().__init__()
        self.source, self.rows, self.labels = source, rows, labels
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.rows[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.rows[index]))

    def pick(self, rows: np.ndarray) -> LabelledImages:
        """Return the images of the given rows, in their order."""
        return LabelledImages(self.source, self.rows[rows], self.labels[rows], self.classes)

    def digest(self) -> str:
        """Return the SHA-256 of the class names and of each image's path, size, mtime and label."""
        total = hashlib.sha256("\n".join(self.classes).encode())
        for i, label in enumerate(self.labels.tolist()):
            name = self.name(i)
            try:
                status = os.stat(name)
                total.update(f"\n{name} {status.st_size} {status.st_mtime_ns} {label}".encode())
            except OSError:
                total.update(f"\n{name} {label}".encode())
        return total.hexdigest()


def open_labelled(spec: str) -> LabelledImages:
    """Open the images of a folder of class folders.

    Raises:
        UserError: there are no class folders, the folders are splits, or an image lies outside the
            class folders.
    """
    source = open_source([spec])
    if source.labels is None or (source.labels < 0).any():
        where = spec if source.labels is None else source.name(int(np.argmax(source.labels < 0)))
        raise UserError(
            f"{where} is not in a class folder: give a folder that contains one folder of images "
            f"per class."
        )
    if set(source.classes) <= SPLITS:
        raise UserError(
            f"{spec} contains the folders {', '.join(source.classes)}, which look like splits, not "
            f"like classes: give each split by itself, such as {spec}/{source.classes[0]}."
        )
    return LabelledImages(
        source, np.arange(len(source)), source.labels.astype(np.int64), source.classes
    )


def open_train_and_test(
    train: str, test: str | None = None, *, holdout: float = 0.2, seed: int = 0
) -> tuple[LabelledImages, LabelledImages]:
    """Open training and test images with a common numbering of the classes.

    Args:
        test: folder of the test images; None to hold out a share of ``train``, see
            `stratified_split`.

    Raises:
        UserError: see `open_labelled`; or there is a single class, or the test images have a class
            that the training images lack.
    """
    images = open_labelled(train)
    if len(images.classes) < 2:
        raise UserError(
            f"{train} contains only the class {images.classes[0]}: give a folder with two or more."
        )
    if test is None:
        kept, held = stratified_split(images.labels, holdout, seed)
        return images.pick(kept), images.pick(held)
    tested = open_labelled(test)
    unknown = sorted(set(tested.classes) - set(images.classes))
    if unknown:
        raise UserError(
            f"{test} has {counted(len(unknown), 'class')} that {train} lacks, first {unknown[0]}: "
            f"give folders with the same classes."
        )
    number = np.array([images.classes.index(name) for name in tested.classes])
    return images, LabelledImages(tested.source, tested.rows, number[tested.labels], images.classes)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a random share of every class, reproducible by the seed.

    Of the n images of a class, round(share * n) are held out, at least 1 and at most n - 1 (so none
    of a class with a single image).

    Returns:
        The rows kept and the rows held out, both in ascending order.

    Raises:
        UserError: ``share`` outside (0, 1).
    """
    if not 0.0 < share < 1.0:
        raise UserError(f"--holdout is {share}: give a share between 0 and 1, such as 0.2.")
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[rng.permutation(rows)[:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


@dataclass(frozen=True)
class Preprocessing:
    """Bilinear, antialiased resizing of the short side, followed by a square centre crop.

    Attributes:
        crop_size: side of the square, in pixels.
        resize: short side before the crop, in pixels; He et al. 2020 use 256 for a crop of 224.
    """

    crop_size: int
    resize: int

    def __post_init__(self) -> None:
        if not 1 <= self.crop_size <= self.resize:
            raise UserError(
                f"--resize {self.resize} is below --crop-size {self.crop_size}: raise --resize, "
                f"since the crop is taken from the resized image."
            )

    @classmethod
    def of(cls, crop_size: int, resize: int | None = None) -> Preprocessing:
        """Return a preprocessing whose short side is 8/7 of the crop, unless given."""
        return cls(crop_size, resize or round(crop_size * 256 / 224))

    def __call__(self, image: np.ndarray) -> Tensor:
        """Preprocess one image: uint8 (H, W, 3) RGB -> uint8 (3, crop_size, crop_size)."""
        height, width, _ = image.shape
        short = min(height, width)
        size = (self.resize * height // short, self.resize * width // short)
        x = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)[0]  # 3xH'xW'
        top, left = (round((side - self.crop_size) / 2) for side in size)
        return x[:, top : top + self.crop_size, left : left + self.crop_size]


def read_batches(
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    threads: int = 1,
    rows: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Tensor, list[str]]]:
    """Yield images in order, decoding the next batch while the current one is used.

    Threads are enough, because decoding and resizing release the GIL; unlike processes, they do not
    affect the random generators or the memory of a training run.

    Args:
        rows: indices of the images; default: all.

    Yields:
        The rows (n,) that could be read, their images, uint8 (n, 3, S, S), and one message for each
        image that could not be read.
    """
    wanted = np.arange(len(images)) if rows is None else rows
    parts = np.split(wanted, range(batch_size, len(wanted), batch_size))

    def load(row: int) -> Tensor | str:
        try:
            return preprocessing(decode(images.read(row)))  # in full, as in the paper
        except (OSError, DecodeError) as error:
            return f"{images.name(row)}: {error}"

    with ThreadPoolExecutor(max(1, threads)) as pool:

        def start(part: np.ndarray) -> list[Future[Tensor | str]]:
            return [pool.submit(load, row) for row in part.tolist()]

        ahead = start(parts[0])
        for i, part in enumerate(parts):
            loaded = [future.result() for future in ahead]
            ahead = start(parts[i + 1]) if i + 1 < len(parts) else []
            good = [x for x in loaded if isinstance(x, Tensor)]
            bad = [x for x in loaded if isinstance(x, str)]
            if good:
                read = np.array([isinstance(x, Tensor) for x in loaded])
                yield part[read], torch.stack(good), bad
            elif bad:
                side = preprocessing.crop_size
                yield part[:0], torch.zeros(0, 3, side, side, dtype=torch.uint8), bad


def splits_of(folder: str) -> tuple[str, str | None]:
    """Return ``folder``/train and ``folder``/test (or /val) if they exist, else (folder, None)."""
    for name in ("test", "val"):
        if (Path(folder) / "train").is_dir() and (Path(folder) / name).is_dir():
            return str(Path(folder) / "train"), str(Path(folder) / name)
    return folder, None

"""The stream of batches: which image comes when, made into views by worker processes.

Position p of the stream is sample p mod B of step p // B. Each image comes once in an epoch of N
positions, so an epoch need not be a whole number of batches and no tail is dropped. Everything
about a sample depends on (seed, p) alone: the run is the same for any number of workers or ranks,
and the position from which it goes on is just the step.
"""

import itertools
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moco_common.errors import UserError
from pretrain.data.decoding import DecodeError, decode
from pretrain.data.source_base import Source
from pretrain.data.stateless_random import uniform
from pretrain.data.transforms.gpu_ops import PendingViews, collect, finish
from pretrain.data.transforms.recipes import MAX_DRAWS, ViewParameters, ViewRecipe, draw, render

BAD_WINDOW = 1000  # samples over which the share of unreadable images is taken
MAX_ATTEMPTS = 20  # unreadable images in a row at one position
_VIEWS = 1  # sets the numbers that views draw apart from those of the order
Item = int | tuple[int, list[bytes | str]]  # a step; of a stream also its images, see `stream`


@dataclass
class Batch:
    """One rank's share of a step.

    Attributes:
        views: a uint8 tensor (B, 3, H, W) each view, RGB, in channels_last layout.
        index: int64 (B,), which image of the source each sample shows.
        skipped: name and reason of each image that could not be read and was replaced.
        pending: for each view what `to` has yet to do to it, or None.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    skipped: list[tuple[str, str]] = field(default_factory=list)
    pending: list[PendingViews | None] = field(default_factory=list)

    def to(self, device: torch.device | str) -> list[torch.Tensor]:
        """The views on the device and finished there: uint8 (B, 3, H, W), channels_last."""
        views = [view.to(device, non_blocking=True) for view in self.views]
        pending = self.pending or [None] * len(views)
        return [
            view if rest is None else finish(view, rest)
            for view, rest in zip(views, pending, strict=True)
        ]

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader where pinning was asked for."""
        self.views = [view.pin_memory() for view in self.views]
        return self


def build_batches(
    source: Source,
    recipes: Sequence[ViewRecipe],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int,
    start_step: int = 0,
    stop_step: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    max_bad_share: float = 0.05,
) -> Generator[Batch, None, None]:
    """Yields one batch for each step in [start_step, stop_step).

    Args:
        recipes: one a view.
        batch_size: over all ranks; rank r of W takes samples [r B / W, (r + 1) B / W) of a step.
        num_workers: processes that make the views; 0 makes them in this one. The batches are
            the same, bit for bit. Streamed shards are read by a thread of this process.
        max_bad_share: an unreadable image is replaced by another one, drawn at random (in a
            stream, by the next one of the rank's batch); if more than this share of the last
            `BAD_WINDOW` samples were, that is an error.

    Raises:
        UserError: the batch cannot be divided over the ranks, or too many images are unreadable.
    """
    if batch_size % world_size:
        raise UserError(
            f"the batch of {batch_size} cannot be divided over {world_size} ranks: "
            f"set SOLVER.BATCH_SIZE to a multiple of {world_size}"
        )
    share = batch_size // world_size
    samples = range(rank * share, (rank + 1) * share)
    steps = _Steps(source, tuple(recipes), batch_size, samples, seed)
    return _watch(
        DataLoader(
            steps,
            batch_size=None,  # an item is a whole batch
            sampler=_Items(steps, range(start_step, stop_step)),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_use_one_thread,
            generator=torch.Generator(),  # or else starting it would draw from the global one
            # Forked workers share the list of images with this process.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        ),
        max_bad_share,
    )


def sample_numbers(seed: int, positions: np.ndarray, views: int) -> np.ndarray:
    """The randomness of each sample and its views: float64 (len(positions), enough) in [0, 1)."""
    return uniform(MAX_ATTEMPTS + MAX_DRAWS * views, seed, _VIEWS, positions)


class _Steps(Dataset[Batch]):
    """Item s is one rank's batch of step s."""

    def __init__(
        self,
        source: Source,
        recipes: tuple[ViewRecipe, ...],
        batch_size: int,
        samples: range,
        seed: int,
    ) -> None:
        self.source = source
        self.recipes = recipes
        self.batch_size = batch_size
        self.samples = samples  # of each global batch, this rank's
        self.seed = seed

    def positions(self, step: int) -> np.ndarray:
        """int64 (B,): where in the stream of samples this rank's batch lies."""
        return step * self.batch_size + np.arange(self.samples.start, self.samples.stop)

    def __getitem__(self, item: Item) -> Batch:
        step, streamed = item if isinstance(item, tuple) else (item, None)
        positions = self.positions(step)
        numbers = sample_numbers(self.seed, positions, len(self.recipes))
        index = self.source.order(positions, self.batch_size, self.seed)
        wanted = index.tolist()
        buffers = [
            np.empty((len(positions), r.crop_size, r.crop_size, 3), np.uint8) for r in self.recipes
        ]
        drawn: list[list[ViewParameters]] = []  # of each sample, one a view
        skipped: list[tuple[str, str]] = []
        for j, image in enumerate(wanted):
            random = iter(numbers[j].tolist()).__next__
            if streamed is None:
                candidates = self._read(image, random)
            else:
                candidates = zip(wanted[j:] + wanted[:j], streamed[j:] + streamed[:j], strict=True)
            outs = [buffer[j] for buffer in buffers]
            index[j], parameters = self._fill(outs, candidates, random, skipped)
            drawn.append(parameters)
        pending = [
            collect(parameters) if recipe.on_device else None
            for recipe, parameters in zip(self.recipes, zip(*drawn, strict=True), strict=True)
        ]
        views = [torch.from_numpy(buffer).permute(0, 3, 1, 2) for buffer in buffers]  # Bx3xHxW
        return Batch(views, torch.from_numpy(index), skipped, pending)

    def _read(self, image: int, random: Callable[[], float]) -> Iterator[tuple[int, bytes | str]]:
        """The image, then others at random: each with its bytes, or why there are none."""
        while True:
            try:
                yield image, self.source.read(image)
            except OSError as error:
                yield image, str(error)
            image = int(random() * len(self.source))

    def _fill(
        self,
        outs: list[np.ndarray],
        candidates: Iterator[tuple[int, bytes | str]],
        random: Callable[[], float],
        skipped: list[tuple[str, str]],
    ) -> tuple[int, list[ViewParameters]]:
        """Renders all views of the first image that can be read; returns which, and the draws."""
        side = max(recipe.crop_size for recipe in self.recipes)
        area = max(recipe.min_area for recipe in self.recipes)
        for image, data in itertools.islice(candidates, MAX_ATTEMPTS):
            try:
                if isinstance(data, str):
                    raise DecodeError(data)
                pixels = decode(data, min_side=side, min_area=area)
            except DecodeError as error:
                skipped.append((self.source.name(image), str(error)))
                continue
            height, width, _ = pixels.shape
            drawn = [draw(recipe, height, width, random) for recipe in self.recipes]
            for recipe, parameters, out in zip(self.recipes, drawn, outs, strict=True):
                render(pixels, parameters.geometry if recipe.on_device else parameters, out)
            return image, drawn
        # `_watch` stops the run.
        return -1, [ViewParameters((0, 0, 1, 1), 1)] * len(self.recipes)


class _Items:
    """What the workers are sent: steps, with the encoded images where these are a stream."""

    def __init__(self, steps: _Steps, numbers: range) -> None:
        self.steps = steps
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Item]:
        source, steps = self.steps.source, self.steps
        if not source.streamed:
            return iter(self.numbers)
        batches = (steps.positions(step) for step in self.numbers)
        return zip(self.numbers, source.stream(batches, steps.batch_size, steps.seed), strict=True)


def _use_one_thread(worker: int) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _start(batches: DataLoader[Any]) -> Iterator[Batch]:
    """Starts the workers. A fork while OpenCV has threads would wait for ever on their copies."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return iter(batches)
    finally:
        cv2.setNumThreads(threads)


def _watch(batches: DataLoader[Any], max_bad_share: float) -> Generator[Batch, None, None]:
    """Passes the batches on while enough of their images could be read."""
    window: deque[tuple[int, int]] = deque()  # samples and skipped images of the last batches
    for batch in _start(batches):
        window.append((len(batch.index), len(batch.skipped)))
        while sum(samples for samples, _ in window) - window[0][0] >= BAD_WINDOW:
            window.popleft()
        samples = max(BAD_WINDOW, sum(samples for samples, _ in window))
        bad = sum(bad for _, bad in window)
        if bad > max_bad_share * samples or (batch.index < 0).any():
            examples = "; ".join(f"{name}: {reason}" for name, reason in batch.skipped[-3:])
            raise UserError(
                f"{bad} of the last {samples} images could not be read, more than the "
                f"{max_bad_share:.0%} that are tolerated ({examples}): mend or remove them"
            )
        yield batch

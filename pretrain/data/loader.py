"""The stream of batches: the order of the images, and the workers that turn them into views.

Position p of the stream is sample p mod B of step p // B. Each image occurs once per epoch of N
positions, so an epoch need not be a whole number of batches and no samples are dropped at its end.
Every sample depends on (seed, p) alone: the stream is the same for any number of workers or ranks,
and resuming it takes nothing but the step.
"""

import itertools
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moco_common.errors import Stopped, UserError
from moco_common.images import DecodeError
from pretrain.data.decoding import decode
from pretrain.data.source_base import Source
from pretrain.data.stateless_random import uniform
from pretrain.data.transforms.gpu_ops import PendingViews, collect, finish
from pretrain.data.transforms.recipes import MAX_DRAWS, ViewParameters, ViewRecipe, draw, render

BAD_WINDOW = 1000  # number of recent samples over which unreadable images are counted
MAX_ATTEMPTS = 20  # images tried at one position before giving up
_VIEWS = 1  # hash key that separates the views' random numbers from those of the order
Item = int | tuple[int, list[bytes | str]]  # a step, with its images for a streamed source


@dataclass
class Batch:
    """One rank's share of a step's batch.

    Attributes:
        views: one uint8 tensor (B, 3, H, W) per view, RGB, in channels_last layout.
        index: int64 (B,), index in the source of the image that each sample shows.
        places: float32 (views, B, 5), where in its image each view lies, see
            `ViewParameters.place`.
        skipped: (name, reason) of each image that could not be read and was replaced.
        pending: operations that `to` still has to apply, one entry per view; None for none.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    places: torch.Tensor
    skipped: list[tuple[str, str]] = field(default_factory=list)
    pending: list[PendingViews | None] = field(default_factory=list)

    def to(self, device: torch.device | str) -> list[torch.Tensor]:
        """Move the views to the device and finish them there.

        Returns:
            uint8 (B, 3, H, W) in channels_last layout, one per view.
        """
        views = [view.to(device, non_blocking=True) for view in self.views]
        pending = self.pending or [None] * len(views)
        return [
            view if rest is None else finish(view, rest)
            for view, rest in zip(views, pending, strict=True)
        ]

    def pin_memory(self) -> "Batch":
        """Pin views and places in memory; called by the DataLoader if ``pin_memory`` is set."""
        self.views = [view.pin_memory() for view in self.views]
        self.places = self.places.pin_memory()
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
    reduce: bool = True,
) -> Generator[Batch, None, None]:
    """Yield one batch for each step in [start_step, stop_step).

    Args:
        recipes: one per view.
        batch_size: size of the global batch B; rank r of W takes samples [r B / W, (r + 1) B / W)
            of each step.
        num_workers: number of processes that make the views; 0 makes them in this process. The
            batches are bit-for-bit the same for any number. Streamed shards are read by a thread
            of this process.
        max_bad_share: largest tolerated share of unreadable images among the last `BAD_WINDOW`
            samples. Each is replaced by an image drawn at random (in a stream, by the next one of
            the rank's batch).
        reduce: decode a JPEG at a reduced size where that still exceeds the views.

    Raises:
        UserError: the batch cannot be divided among the ranks, or too many images are unreadable.
    """
    if batch_size % world_size:
        raise UserError(
            f"a batch of {batch_size} cannot be divided among {world_size} ranks: "
            f"set SOLVER.BATCH_SIZE to a multiple of {world_size}"
        )
    share = batch_size // world_size
    samples = range(rank * share, (rank + 1) * share)
    steps = _Steps(source, tuple(recipes), batch_size, samples, seed, reduce)
    return _watch(
        DataLoader(
            steps,
            batch_size=None,  # an item is a whole batch
            sampler=_Items(steps, range(start_step, stop_step)),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_use_one_thread,
            generator=torch.Generator(),  # keeps the loader from drawing from the global one
            # Forked workers share the list of images with this process.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        ),
        max_bad_share,
    )


def sample_numbers(seed: int, positions: np.ndarray, views: int) -> np.ndarray:
    """Return the random numbers of each sample and its views.

    Returns:
        float64 (len(positions), MAX_ATTEMPTS + MAX_DRAWS * views), in [0, 1).
    """
    return uniform(MAX_ATTEMPTS + MAX_DRAWS * views, seed, _VIEWS, positions)


class _Steps(Dataset[Batch]):
    """A dataset whose item s is one rank's batch of step s."""

    def __init__(
        self,
        source: Source,
        recipes: tuple[ViewRecipe, ...],
        batch_size: int,
        samples: range,
        seed: int,
        reduce: bool,
    ) -> None:
        self.source = source
        self.reduce = reduce
        self.recipes = recipes
        self.batch_size = batch_size
        self.samples = samples  # this rank's samples of each global batch
        self.seed = seed

    def positions(self, step: int) -> np.ndarray:
        """Return the positions of this rank's samples in the stream: int64 (B,)."""
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
        drawn: list[list[ViewParameters]] = []  # one list per sample, one entry per view
        places = np.zeros((len(self.recipes), len(positions), 5), np.float32)
        skipped: list[tuple[str, str]] = []
        for j, image in enumerate(wanted):
            random = iter(numbers[j].tolist()).__next__
            if streamed is None:
                candidates = self._read(image, random)
            else:
                candidates = zip(wanted[j:] + wanted[:j], streamed[j:] + streamed[:j], strict=True)
            outs = [buffer[j] for buffer in buffers]
            index[j], parameters, (height, width) = self._fill(outs, candidates, random, skipped)
            places[:, j] = [p.place(height, width) for p in parameters]
            drawn.append(parameters)
        pending = [
            collect(parameters) if recipe.on_device else None
            for recipe, parameters in zip(self.recipes, zip(*drawn, strict=True), strict=True)
        ]
        views = [torch.from_numpy(buffer).permute(0, 3, 1, 2) for buffer in buffers]  # Bx3xHxW
        return Batch(views, torch.from_numpy(index), torch.from_numpy(places), skipped, pending)

    def _read(self, image: int, random: Callable[[], float]) -> Iterator[tuple[int, bytes | str]]:
        """Yield the image, then random others, each with its bytes or the error's message."""
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
    ) -> tuple[int, list[ViewParameters], tuple[int, int]]:
        """Render all views of the first readable image; return its index, the parameters, and the
        height and width in pixels of the image that the boxes refer to."""
        side = max(recipe.crop_size for recipe in self.recipes) if self.reduce else None
        area = max(recipe.min_area for recipe in self.recipes) if self.reduce else None
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
            return image, drawn, (height, width)
        # `_watch` stops the run.
        return -1, [ViewParameters((0, 0, 1, 1), 1)] * len(self.recipes), (1, 1)


class _Items:
    """The sampler: yields steps, together with the encoded images if the source is streamed."""

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
    """Start the workers, with OpenCV's thread pool shut down: a forked copy of it would hang."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return iter(batches)
    finally:
        cv2.setNumThreads(threads)


def _ending_workers(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches; if the wait for one is interrupted, kill the workers, which may hang."""
    try:
        yield from batches
    except (Stopped, KeyboardInterrupt):
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises if a worker dies
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join(1.0)
        signal.signal(signal.SIGCHLD, before)
        raise


def _watch(batches: DataLoader[Any], max_bad_share: float) -> Generator[Batch, None, None]:
    """Yield the batches; raise ``UserError`` once too many images are unreadable."""
    window: deque[tuple[int, int]] = deque()  # (samples, skipped images) of the last batches
    for batch in _ending_workers(_start(batches)):
        window.append((len(batch.index), len(batch.skipped)))
        while sum(samples for samples, _ in window) - window[0][0] >= BAD_WINDOW:
            window.popleft()
        samples = max(BAD_WINDOW, sum(samples for samples, _ in window))
        bad = sum(bad for _, bad in window)
        if bad > max_bad_share * samples or (batch.index < 0).any():
            examples = "; ".join(f"{name}: {reason}" for name, reason in batch.skipped[-3:])
            raise UserError(
                f"{bad} of the last {samples} images could not be read, more than the tolerated "
                f"{max_bad_share:.0%} ({examples}): fix or remove them"
            )
        yield batch

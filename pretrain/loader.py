"""The stream of batches: which image comes when, made into views by worker processes.

Position p of the stream is sample p mod B of step p // B. It shows image permutation(e)[p mod N]
in epoch e = p // N, so an epoch need not be a whole number of batches and no tail is dropped.
Everything about a sample depends on (seed, p) alone: the run is the same for any number of
workers or ranks, and the position from which it goes on is just the step.
"""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.decoding import DecodeError, decode
from pretrain.errors import UserError
from pretrain.sources import Source
from pretrain.views import ViewRecipe, draw, render

BAD_WINDOW = 1000  # samples over which the share of unreadable images is taken
MAX_ATTEMPTS = 20  # unreadable images in a row at one position


@dataclass
class Batch:
    """One rank's share of a step.

    Attributes:
        views: a uint8 tensor (B, 3, H, W) each view, RGB, in channels_last layout.
        index: int64 (B,), which image of the source each sample shows.
        skipped: name and reason of each image that could not be read and was replaced.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    skipped: list[tuple[str, str]] = field(default_factory=list)

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
) -> Iterator[Batch]:
    """Yields one batch for each step in [start_step, stop_step).

    Args:
        recipes: one a view.
        batch_size: over all ranks; rank r of W takes samples [r B / W, (r + 1) B / W) of a step.
        num_workers: processes that make the views; 0 makes them in this one. The batches are
            the same, bit for bit.
        max_bad_share: an unreadable image is replaced by another one, drawn at random; if more
            than this share of the last `BAD_WINDOW` samples were, that is an error.

    Raises:
        UserError: the batch cannot be divided over the ranks, or too many images are unreadable.
    """
    if batch_size % world_size:
        raise UserError(
            f"the batch of {batch_size} cannot be divided over {world_size} ranks: "
            f"set SOLVER.BATCH_SIZE to a multiple of {world_size}"
        )
    share = batch_size // world_size
    steps = _Steps(
        source, tuple(recipes), batch_size, range(rank * share, (rank + 1) * share), seed
    )
    return _watch(
        DataLoader(
            steps,
            batch_size=None,  # an item is a whole batch
            sampler=range(start_step, stop_step),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_use_one_thread,
            generator=torch.Generator(),  # or else starting it would draw from the global one
            # Forked workers share the list of images with this process.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        ),
        max_bad_share,
    )


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a random permutation of range(n), one for each seed and epoch, takes positions.

    A Feistel network on pairs of digits to the base ceil(sqrt(n)), applied again to what falls
    outside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4): memory
    does not grow with n, and no worker holds a shuffled list.

    Args:
        positions: int64, any shape, in [0, n).

    Returns:
        int64, the same shape, in [0, n).
    """
    base = np.uint64(max(1, int(np.ceil(np.sqrt(n)))))
    keys = np.random.SeedSequence((seed, epoch)).generate_state(6, np.uint64)
    values = positions.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] // base, values[outside] % base
        for key in keys:
            left, right = right, (left + _mix(right ^ key)) % base
        values[outside] = left * base + right
        outside = values >= n
    return values.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A hash of uint64 (the finaliser of SplitMix64; Steele et al. 2014), below 2^32."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The randomness of one sample. (One integer seeds 2.5 times as fast as a pair.)"""
    return np.random.Generator(np.random.PCG64(seed << 64 | position))


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

    def __getitem__(self, step: int) -> Batch:
        positions = step * self.batch_size + np.arange(self.samples.start, self.samples.stop)
        buffers = [
            np.empty((len(positions), r.crop_size, r.crop_size, 3), np.uint8) for r in self.recipes
        ]
        skipped: list[tuple[str, str]] = []
        index = self._images(positions)
        for j, position in enumerate(positions.tolist()):
            outs = [buffer[j] for buffer in buffers]
            index[j] = self._fill(outs, position, int(index[j]), skipped)
        views = [torch.from_numpy(buffer).permute(0, 3, 1, 2) for buffer in buffers]  # Bx3xHxW
        return Batch(views, torch.from_numpy(index), skipped)

    def _images(self, positions: np.ndarray) -> np.ndarray:
        n = len(self.source)
        images = np.empty_like(positions)
        for epoch in np.unique(positions // n).tolist():
            here = positions // n == epoch
            images[here] = permute(positions[here] % n, n, self.seed, epoch)
        return images

    def _fill(
        self, outs: list[np.ndarray], position: int, image: int, skipped: list[tuple[str, str]]
    ) -> int:
        """Renders all views of one sample; returns the image that was used."""
        rng = sample_rng(self.seed, position)
        for _ in range(MAX_ATTEMPTS):
            try:
                pixels = decode(
                    self.source.read(image),
                    min_side=max(recipe.crop_size for recipe in self.recipes),
                    min_area=max(recipe.min_area for recipe in self.recipes),
                )
            except (OSError, DecodeError) as error:
                skipped.append((self.source.name(image), str(error)))
                image = int(rng.integers(len(self.source)))
                continue
            height, width, _ = pixels.shape
            for recipe, out in zip(self.recipes, outs, strict=True):
                render(pixels, draw(recipe, height, width, rng), out)
            return image
        return -1  # the main process sees MAX_ATTEMPTS skipped images and stops the run


def _use_one_thread(worker: int) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _start(batches: DataLoader) -> Iterator[Batch]:
    """Starts the workers. A fork while OpenCV has threads would wait for ever on their copies."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return iter(batches)
    finally:
        cv2.setNumThreads(threads)


def _watch(batches: DataLoader, max_bad_share: float) -> Iterator[Batch]:
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

"""The order of the images and their random numbers, as functions of seed and position.

A micro-batch is what one process sees in one forward pass. Rank r of W takes, in pass a of A of
iteration t, micro-batch (t A + a) W + r of one endless sequence. So A passes of W processes see
what one pass of A W processes sees, the batches do not depend on the number of loader workers, and
a run resumes from its iteration number alone.
"""

import itertools
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import RepeatFactorTrainingSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from moco_common.errors import UserError
from moco_common.images import DecodeError, read_picture
from moco_common.stopping import WORKERS_GRACE
from moco_common.text import counted
from moco_det.data.label_subsets import register_label_share

# Independent sequences of micro-batches.
TRAINING, PRECISE_BN, PREFLIGHT = range(3)
_ORDER, _SAMPLE, _MODEL = range(3)  # purposes of random numbers
Mapper = Callable[[dict[str, Any]], dict[str, Any]]
Batch = list[dict[str, Any]]


def seed_model(seed: int, sequence: int, number: int) -> None:
    """Seed the sampling of anchors and regions in the forward pass of a micro-batch.

    Sets all generators: torch's, on all devices, NumPy's and Python's.
    """
    _seed(seed, _MODEL, sequence, number, torch.manual_seed)


def _seed(
    seed: int, purpose: int, sequence: int, number: int, torch_seed: Callable[[int], Any]
) -> None:
    words = np.random.SeedSequence((seed, purpose, sequence, number)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch_seed(int(words[2]) << 32 | int(words[3]))


@contextmanager
def _seeded_sample(seed: int, sequence: int, position: int) -> Iterator[None]:
    """Seed the global generators, which Detectron2's augmentations use, and restore them after."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Not torch.manual_seed: a forked worker must not touch CUDA.
    _seed(seed, _SAMPLE, sequence, position, torch.default_generator.manual_seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class MicroBatches(Sampler[list[tuple[int, int]]]):
    """Sampler of micro-batches, lists of (position, image), from one endless sequence.

    Each epoch contains every image once (or ``repeats`` times), in a new order drawn from the
    seed. Images of one group are batched together, as Detectron2 does for wide and tall ones to
    save padding; there each process groups its own images, here the whole sequence is grouped.

    Args:
        groups: the group of each image, 0 or 1.
        batch_size: images per micro-batch.
        numbers: the micro-batches to yield, ascending.
        repeats: occurrences of each image in an epoch, 1 or more; a fraction is an average.
    """

    def __init__(
        self,
        groups: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        sequence: int,
        numbers: range,
        repeats: np.ndarray | None = None,
    ) -> None:
        self._groups = bytes(groups)
        self._batch_size = batch_size
        self._key = (seed, _ORDER, sequence)
        self._numbers = numbers
        self._repeats = repeats

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        wanted = iter(self._numbers)
        waits_for = next(wanted, None)
        forming: tuple[list[tuple[int, int]], ...] = ([], [])
        number = 0
        for position, image in enumerate(self._order()):  # from 0: indices are cheap
            if waits_for is None:
                return
            batch = forming[self._groups[image]]
            batch.append((position, image))
            if len(batch) == self._batch_size:
                if number == waits_for:
                    yield batch[:]
                    waits_for = next(wanted, None)
                number += 1
                batch.clear()

    def _order(self) -> Iterator[int]:
        images = np.arange(len(self._groups))
        for epoch in itertools.count():
            rng = np.random.default_rng((*self._key, epoch))
            if self._repeats is not None:
                chance = rng.random(len(self._groups))
                images = np.repeat(
                    np.arange(len(self._groups)), (self._repeats + chance).astype(np.int64)
                )
            yield from rng.permutation(images).tolist()


@dataclass(frozen=True)
class TrainingSet:
    """The images to train on.

    Attributes:
        images: records in Detectron2's format.
        sizes: int64 (N, 2), width and height; None where the data set lacks them.
        objects: int64 (N,), annotated objects per image.
        repeats: see :class:`MicroBatches`.
        grouped: whether wide and tall images are batched separately.
    """

    images: Sequence[dict[str, Any]]
    sizes: np.ndarray | None
    objects: np.ndarray
    repeats: np.ndarray | None = None
    grouped: bool = True

    @property
    def groups(self) -> np.ndarray:
        """uint8 (N,): 0 for wide images, 1 for the others; all 0 without grouping."""
        if self.sizes is None or not self.grouped:
            return np.zeros(len(self.images), np.uint8)
        return (self.sizes[:, 0] <= self.sizes[:, 1]).astype(np.uint8)

    def batches(
        self,
        mapper: Mapper,
        batch_size: int,
        *,
        seed: int,
        sequence: int,
        numbers: range,
        num_workers: int = 0,
    ) -> Iterator[tuple[int, Batch]]:
        """Yields ``(number, batch)`` for the micro-batches of ``numbers``.

        Args:
            mapper: turns a record into an input of the model; its random numbers depend only on
                the seed, the sequence and the position of the image.
            num_workers: loader processes; with 0 this process maps, with the same result.

        Raises:
            UserError: an image cannot be read.
        """
        sampler = MicroBatches(
            self.groups.tolist(),
            batch_size,
            seed=seed,
            sequence=sequence,
            numbers=numbers,
            repeats=self.repeats,
        )
        loader = DataLoader(
            _Mapped(self.images, mapper, seed, sequence),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=list,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # starting it draws from this one, not the global one
            # Forked workers share the records with this process.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        )
        batches = iter(Readable(loader))
        try:
            yield from zip(numbers, batches, strict=True)
        finally:
            del batches  # ends the workers


class _Mapped(Dataset[dict[str, Any] | UserError]):
    """Item (position, image) is the mapper's result, or the error where the image is unreadable."""

    def __init__(
        self, images: Sequence[dict[str, Any]], mapper: Mapper, seed: int, sequence: int
    ) -> None:
        self.images, self.mapper, self.seed, self.sequence = images, mapper, seed, sequence

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any] | UserError:
        position, image = at
        record = self.images[image]
        with _seeded_sample(self.seed, self.sequence, position):
            return map_or_explain(self.mapper, record)


def map_or_explain(mapper: Mapper, record: dict[str, Any]) -> dict[str, Any] | UserError:
    """Return what a mapper makes of a record, or the error that names an unreadable image.

    It is returned because an error that is raised in a loader's process arrives with the traceback
    of that process.
    """
    try:
        return mapper(record)
    except UserError as error:
        return error
    except (OSError, ValueError, SyntaxError) as error:
        if not isinstance(error, SizeMismatchError) and _can_be_read(record):
            raise  # a bug, not the image
        reason = " ".join(str(error).split()) or type(error).__name__
        return UserError(f"cannot read {record['file_name']}: {reason}.")


class Readable:
    """A loader of what `map_or_explain` returns: its batches, or the first error, raised."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            for item in batch:
                if isinstance(item, UserError):
                    raise item
            yield batch


def _can_be_read(record: Mapping[str, Any]) -> bool:
    try:
        read_picture(record["file_name"])
    except (OSError, DecodeError):
        return False
    return True


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Schedulers and terminals signal every process of a run, but the process that trains still
    # needs its workers until the iteration ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKERS_GRACE))


def load_training_set(cfg: CfgNode) -> TrainingSet:
    """Load the images of ``DATASETS.TRAIN``, filtered and repeated according to the config.

    Raises:
        UserError: no image has an object, or the sampler is not supported.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    share_of_labels, seed = cfg.DATASETS.LABEL_SHARE, cfg.DATASETS.LABEL_SEED
    names = [register_label_share(n, share_of_labels, seed) for n in cfg.DATASETS.TRAIN]
    try:
        records = get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints,
        )
    except AssertionError as error:  # raised by Detectron2 if no image is usable
        raise UserError(f"there is nothing to train on: {error}") from error
    name = cfg.DATALOADER.SAMPLER_TRAIN
    repeats = None
    if name == "RepeatFactorTrainingSampler":
        repeats = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        ).numpy()
    elif name != "TrainingSampler":
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN {name} is not supported: use TrainingSampler or "
            "RepeatFactorTrainingSampler."
        )
    sizes = None
    if all("width" in record and "height" in record for record in records):
        sizes = np.array([(record["width"], record["height"]) for record in records])
    return TrainingSet(
        DatasetFromList(records, copy=False),
        sizes,
        np.array([_objects(record) for record in records]),
        repeats,
        grouped=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )


def _objects(record: Mapping[str, Any]) -> int:
    return sum(not a.get("iscrowd", 0) for a in record.get("annotations", ()))


def share(cfg: CfgNode, world_size: int) -> int:
    """Return the images per micro-batch: the batch divided by processes and passes.

    Raises:
        UserError: the batch is not divisible.
    """
    batch, passes = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    if passes < 1:
        raise UserError(f"SOLVER.ACCUMULATION_STEPS must be at least 1, not {passes}.")
    if batch < 1 or batch % (world_size * passes):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch} cannot be shared by {counted(world_size, 'process')} "
            f"with SOLVER.ACCUMULATION_STEPS {passes}: make it a multiple of {world_size * passes}."
        )
    return int(batch // (world_size * passes))


def numbers(first: int, last: int, *, passes: int, rank: int, world_size: int) -> range:
    """Return the micro-batches of one rank in iterations [first, last)."""
    return range(first * passes * world_size + rank, last * passes * world_size, world_size)

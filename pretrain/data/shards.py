"""Tar shards in the format of the webdataset library: ``shards:URL``.

URL may be whatever webdataset accepts: a path, braces (`/data/{000000..000999}.tar`),
`pipe:COMMAND`, `https:`, `s3:`, `gs:` and others. As in webdataset, consecutive files that share a
name up to the first dot form a sample, of which the first image is used; where no file is called
NAME.EXTENSION, the dots are part of the names, and every image is used.

Plain tar files on a local disk are read in place, at the offsets in an index. The index is built
on first use, stored beside the shards (or in the user's cache) and memory-mapped, so that even a
hundred million images take no memory per process. All other shards are streamed: each rank reads
its part of the shards from front to back and only needs the number of images in each, either from
a `sizes.json` beside them (`{"000000.tar": 1000, ...}`) or by counting on first use, which reads
every shard once. `python -m pretrain.data.shards URL` builds the index or counts in advance.

Both ways give exactly the same run. The order is a function of the position: for any number of
workers and ranks each image occurs once per epoch, and a run can be resumed from any step.

Costs: a resumed stream rereads what precedes its position in each open shard. If the number of
ranks divides LANES, and LANES divides the batch, a shard is streamed once per epoch, or twice if
two lanes meet in it; with more ranks, several of them read the same lane. A stream buffers LANES x
WINDOW images over all ranks (that many on each rank if the source is no larger), and a thread of
the main process unpacks them.
"""

import hashlib
import math
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moco_common.errors import UserError
from moco_common.files import MAX_BYTES
from moco_common.text import counted
from pretrain.data.shard_index import (
    DAMAGE,
    LOST,
    expand_urls,
    load_index,
    load_sizes,
    local_path,
    read_samples,
    too_large,
)
from pretrain.data.source_base import PassedOver, Source
from pretrain.data.stateless_random import hash64, permute

LANES = 64  # number of parts of the shards that are read in parallel
WINDOW = 64  # number of consecutive images of a lane that are shuffled together
SAMPLE = 65536  # number of shards and of images whose sizes are compared on resume
_AHEAD = 4  # number of batches that a stream prefetches


def open_shards(specs: Sequence[str]) -> "ShardSource":
    """Open one or more URLs, given without ``shards:``, as one source.

    Raises:
        UserError: webdataset is not installed, or a shard is missing or holds no image.
    """
    urls = [url for spec in specs for url in expand_urls(spec)]
    local = [local_path(url) for url in urls]
    missing = [path for path in local if path is not None and not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(urls)} shards do not exist, the first is {missing[0]}: "
            f"fix the path in shards:{specs[0]}"
        )
    passed = PassedOver()
    paths = [path for path in local if path is not None and path.endswith(".tar")]
    if len(paths) == len(urls):
        table = load_index(paths, passed)
        counts, places = table[: len(urls), 0], table[len(urls) :]
        source = ShardSource(paths, counts, places)
    else:
        source = ShardSource(urls, load_sizes(urls, passed))
    found = str(passed)
    if not len(source):
        about = f" ({found})" if found else ""
        raise UserError(f"shards:{specs[0]} contains no images{about}: give tar files of images")
    source.notes = (f"shards:{specs[0]}: {found}",) if found else ()
    return source


class ShardSource(Source):
    """The images of tar files, ordered by shard and then by sample.

    Args:
        urls: one per shard.
        counts: int64 (len(urls),), number of images in each shard.
        places: int64 (images, 2), offset and size in bytes of each image; None for streams.
    """

    def __init__(
        self, urls: Sequence[str], counts: np.ndarray, places: np.ndarray | None = None
    ) -> None:
        super().__init__()
        self.urls = list(urls)
        self.counts = np.asarray(counts, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.places = places
        self.streamed = places is None
        self._epoch: tuple[int, int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, index: int) -> str:
        """Return the shard of one image and its number there, for messages."""
        shard, number = self._locate(index)
        return f"{self.urls[shard]}#{number}"

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one image; raise `OSError` if the shard lacks it."""
        if self.places is None:
            raise TypeError("streamed shards cannot be read by index")
        shard, _ = self._locate(index)
        offset, size = self.places[index].tolist()
        if size > MAX_BYTES:
            raise OSError(too_large(size))
        with open(self.urls[shard], "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(LOST)
        return data

    def fingerprint(self) -> dict[str, str]:
        """Return digests of the shards' names and of the images in each."""
        names = "\n".join(os.path.basename(url) for url in self.urls)
        sizes = [x for x in (self.counts, self.places) if x is not None]
        return {
            "names": hashlib.sha256(names.encode()).hexdigest(),
            "sizes": hashlib.sha256(b"".join(x[:SAMPLE].tobytes() for x in sizes)).hexdigest(),
        }

    def order(self, positions: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
        """Return the index of the image at each position, see `Source.order`.

        The batch is cut into equal slices, the lanes. Each lane takes a contiguous part of the
        epoch's sequence of shards and shuffles it in windows.
        """
        images = np.empty_like(positions)
        epochs, *_, sequence = self._plan(positions, batch_size, seed)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shards, ends = self._shard_order(epoch, seed)
            place = np.searchsorted(ends, sequence[here], side="right")
            from_end = ends[place] - sequence[here]
            images[here] = self.starts[shards[place] + 1] - from_end
        return images

    def stream(
        self, batches: Iterator[np.ndarray], batch_size: int, seed: int
    ) -> Iterator[list[bytes | str]]:
        """Yield the encoded images at each array of positions, prefetched; see `Source.stream`.

        Args:
            batches: positions of one rank, int64 (B,) each, ascending.
        """
        return _read_ahead(_Lanes(self, batch_size, seed).images(batches), _AHEAD)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def _plan(
        self, positions: np.ndarray, batch_size: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return, for each position, its epoch, lane, window (first place, length) and place.

        A place is an index into the images of the epoch's sequence of shards.
        """
        n = len(self)
        whole = n <= LANES * WINDOW  # the buffer holds everything: one lane, one window
        lanes = 1 if whole else math.gcd(batch_size, LANES)
        window = n if whole else WINDOW
        share = batch_size // lanes

        def below(position: np.ndarray, lane: np.ndarray) -> np.ndarray:
            """Return the number of earlier positions on earlier lanes."""
            steps, rest = position // batch_size, position % batch_size
            count: np.ndarray = steps * share * lane + np.minimum(rest, share * lane)
            return count

        epoch = positions // n
        first, last = epoch * n, (epoch + 1) * n
        lane = positions % batch_size // share
        start = below(last, lane) - below(first, lane)  # start of the lane in the epoch
        size = below(last, lane + 1) - below(first, lane + 1) - start
        done = below(positions, lane + 1) - below(positions, lane)
        done -= below(first, lane + 1) - below(first, lane)
        begin = done // window * window
        length = np.minimum(window, size - begin)
        place = permute(done - begin, length, hash64(seed, epoch, lane, begin))
        return epoch, lane, start + begin, length, start + begin + place

    def _shard_order(self, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards of an epoch in order, and the places at which they end."""
        if self._epoch is None or self._epoch[:2] != (epoch, seed):
            n = len(self.urls)
            shards = permute(np.arange(n), n, hash64(seed, epoch))
            self._epoch = epoch, seed, shards, np.cumsum(self.counts[shards])
        return self._epoch[2:]


class _Lanes:
    """Reads forward on each lane that is asked for, a window at a time."""

    def __init__(self, source: ShardSource, batch_size: int, seed: int) -> None:
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.buffers: dict[int, dict[int, bytes | str]] = {}  # lane -> place -> image
        self.windows: dict[int, tuple[int, int]] = {}  # lane -> epoch and first place
        self.cursors: dict[int, tuple[tuple[int, int], Iterator[bytes | str]]] = {}

    def images(self, batches: Iterator[np.ndarray]) -> Iterator[list[bytes | str]]:
        for positions in batches:
            plan = self.source._plan(positions, self.batch_size, self.seed)
            rows = zip(*(column.tolist() for column in plan), strict=True)
            yield [self._image(*row) for row in rows]

    def _image(self, epoch: int, lane: int, begin: int, length: int, place: int) -> bytes | str:
        if self.windows.get(lane) != (epoch, begin):
            where, cursor = self.cursors.get(lane, (None, None))
            if cursor is None or where != (epoch, begin):
                cursor = self._read_from(epoch, begin)
            self.buffers[lane] = {begin + i: next(cursor) for i in range(length)}
            self.windows[lane] = epoch, begin
            self.cursors[lane] = (epoch, begin + length), cursor
        return self.buffers[lane].pop(place)

    def _read_from(self, epoch: int, place: int) -> Iterator[bytes | str]:
        """Yield the images of an epoch's sequence of shards, starting at a place."""
        shards, ends = self.source._shard_order(epoch, self.seed)
        for i in range(int(np.searchsorted(ends, place, side="right")), len(shards)):
            shard = int(shards[i])
            count = int(self.source.counts[shard])
            number = place - (int(ends[i]) - count)  # index of the image in its shard
            samples = read_samples(self.source.urls[shard])
            reason = LOST
            try:
                for _ in range(number):
                    next(samples)
                for _ in range(number, count):
                    yield next(samples)
                    number += 1
            except StopIteration:
                pass
            except (*DAMAGE, OSError) as error:
                reason = f"{LOST} ({error})"
            finally:
                samples.close()
            place = int(ends[i])
            yield from [reason] * (count - number)


def _read_ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """Yield the same items, prefetched by a thread, at most `depth` in advance."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:  # raised again in the consuming thread
            put((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            more, item = ready.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stopped.set()


def main(specs: Sequence[str]) -> int:
    """Build the index of the shards, or count the images of streamed ones."""
    try:
        source = open_shards([spec.removeprefix("shards:") for spec in specs])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{counted(len(source), 'image')} in {counted(len(source.urls), 'shard')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

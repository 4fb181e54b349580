"""The base class of all image sources, and what they pass over."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from functools import cache

import numpy as np

from moco_common.text import counted
from pretrain.data.stateless_random import hash64, permute

# Files with these endings are taken for images without a look inside, those of a data set's other
# files for none; any other file is recognised by its content.
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
     ".pgm", ".avif"}
)  # fmt: skip
OTHER_EXTENSIONS = frozenset(
    {".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".md", ".html", ".py",
     ".cls", ".npy", ".npz", ".pth", ".pt", ".mat", ".zip", ".tar", ".gz", ".mp4", ".avi", ".mov"}
)  # fmt: skip
# Names of folders that are parts of a data set, not classes.
SPLITS = frozenset({"train", "test", "val", "valid", "validation"})


class PassedOver:
    """The files and frames that a source does not use, and what it could not read."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()
        self.unreadable: list[str] = []  # each with its reason
        self.frames = ""  # what became of a video's frames

    def add(self, name: str) -> None:
        """Count a file."""
        ending = os.path.splitext(name)[1].lower()
        self.endings[ending if 1 < len(ending) <= 8 else "without a known ending"] += 1

    def __str__(self) -> str:
        """One clause; "" if nothing was passed over."""
        parts = [self.frames] if self.frames else []
        if self.endings:
            listed = ", ".join(f"{n} {ending}" for ending, n in self.endings.most_common(8))
            more = ", ..." if len(self.endings) > 8 else ""
            heic = any(self.endings[ending] for ending in (".heic", ".heif"))
            advice = "; convert HEIC to JPEG to use it" if heic else ""
            total = counted(self.endings.total(), "file")
            parts.append(f"{total} passed over ({listed}{more}{advice})")
        if self.unreadable:
            first = self.unreadable[0]
            parts.append(f"{counted(len(self.unreadable), 'item')} unreadable (first {first})")
        return ", ".join(parts)


class Source(ABC):
    """An indexed, immutable sequence of encoded images, opened by `sources.open_source`.

    Attributes:
        classes: names of the class folders, sorted; empty if there are none.
        labels: int32 array (len,) of indices into `classes`, -1 for no class; None if there are no
            classes. The class of an image is the topmost folder below the given one.
        notes: remarks for the log about what was passed over.
        streamed: True if images come from `stream` instead of `read` (see `shards.ShardSource`).
    """

    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    streamed = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one image; raise `OSError` if they cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of one image for messages: its path, if it has one."""

    def files_in(self, folder: str | os.PathLike[str]) -> list[str]:
        """Return the paths of the images directly in a folder, which nothing may write over."""
        here, resolve = os.path.realpath(folder), cache(os.path.realpath)
        names = map(self.name, range(len(self)))
        return [name for name in names if resolve(os.path.dirname(name)) == here]

    def fingerprint(self) -> dict[str, str]:
        """Return digests by which a resumed run recognises changed data, as part -> digest; parts
        are ``names`` and ``sizes``, and those that cost too much to compute are left out."""
        return {}

    def stream(
        self, batches: Iterator[np.ndarray], batch_size: int, seed: int
    ) -> Iterator[list[bytes | str]]:
        """Yield the encoded images at each array of positions; see `streamed`.

        Each image is its encoded bytes, or the reason why it could not be read.
        """
        raise TypeError("these images are read by index")

    def order(self, positions: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
        """Return the index of the image at each position of the stream of samples.

        Each image occurs once per epoch, and an epoch is `len` positions for any batch size.

        Args:
            positions: int64, any shape, non-negative.

        Returns:
            int64, same shape, in [0, len).
        """
        n = len(self)
        return permute(positions % n, n, hash64(seed, positions // n))

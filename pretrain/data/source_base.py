"""The base class of all image sources."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache

import numpy as np

from pretrain.data.stateless_random import hash64, permute

EXTENSIONS = (
    b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff", b".ppm", b".pgm",
)  # fmt: skip


class Source(ABC):
    """An indexed, immutable sequence of encoded images, opened by `sources.open_source`.

    Attributes:
        classes: names of the class folders, sorted; empty if there are none.
        labels: int32 array (len,) of indices into `classes`, -1 for no class; None if there are no
            classes. The class of an image is the topmost folder below the given one.
        streamed: True if images come from `stream` instead of `read` (see `shards.ShardSource`).
    """

    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
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

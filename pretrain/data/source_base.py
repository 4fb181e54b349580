"""What every source of images is, whatever it reads."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from pretrain.data.stateless_random import hash64, permute

EXTENSIONS = (
    b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff", b".ppm", b".pgm",
)  # fmt: skip


class Source(ABC):
    """An indexed, immutable sequence of encoded images. Make one with `sources.open_source`.

    Attributes:
        classes: names of the class folders, sorted; empty where there are none.
        labels: int32 array (len,), index into `classes` or -1; None where there are no classes.
            An image's class is the topmost folder between the given folder and the image.
        streamed: whether there is no `read`, but a `stream` (see `shards.ShardSource`).
    """

    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    streamed = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded bytes of one image; `OSError` if they cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call one image in messages: its path, where it has one."""

    def stream(
        self, batches: Iterator[np.ndarray], batch_size: int, seed: int
    ) -> Iterator[list[bytes | str]]:
        """The encoded images at each array of positions, or why there is none; see `streamed`."""
        raise TypeError("these images are read by index")

    def order(self, positions: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
        """Which image comes at each position of the stream of samples.

        Each image comes once an epoch, and an epoch is `len` positions, whatever the batch.

        Args:
            positions: int64, any shape, not negative.

        Returns:
            int64, the same shape, in [0, len).
        """
        n = len(self)
        return permute(positions % n, n, hash64(seed, positions // n))

"""Frames of images: size, rotation, and the transform from the annotated frame."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from moco_common.images import (
    DecodeError,
    RefusedImageError,
    open_picture,
    orientation,
    stored_size,
)
from moco_det.data.datasets.findings import DatasetReport

PNG_EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp")


@dataclass(frozen=True)
class ImageHeader:
    """Size as stored (pixels) and EXIF orientation (1 to 8) of an image file."""

    width: int
    height: int
    orientation: int = 1

    @property
    def stored(self) -> tuple[int, int]:
        """(width, height) of the pixels as they lie in the file, not turned."""
        return self.width, self.height

    @property
    def shown(self) -> tuple[int, int]:
        """(width, height) once the orientation is applied, as Detectron2 reads the image."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored


def read_header(path: str | os.PathLike[str]) -> ImageHeader | str:
    """Read an image's header without decoding the pixels; the reason where it is unusable."""
    try:
        with open_picture(path) as image:
            # On a PNG without these keys getexif() would decode the whole image to look for a chunk
            # after the pixels.
            tagged = image.format != "PNG" or any(key in image.info for key in PNG_EXIF_KEYS)
            turn = orientation(image) if tagged else 1
            return ImageHeader(*stored_size(image), turn)
    except FileNotFoundError:
        return "image missing"
    except RefusedImageError as error:
        return str(error)
    except (DecodeError, OSError):
        return "image unreadable"


def read_headers(paths: Sequence[str | os.PathLike[str]]) -> list[ImageHeader | str]:
    """:func:`read_header` of many files, in threads, as the time is spent waiting for the disk."""
    chunks = [paths[start : start + 64] for start in range(0, len(paths), 64)]
    with ThreadPoolExecutor(max_workers=16) as pool:
        read = pool.map(lambda chunk: [read_header(path) for path in chunk], chunks)
        return [header for chunk in read for header in chunk]


# Pixels by which rounding may move a box out of its image; from the second on it is counted.
ROUNDING, COUNTED = 0.5, 0.01


@dataclass(frozen=True)
class Frame:
    """The frame an image is read in, and the way into it from the annotation's frame.

    ``matrix`` (2 x 3) maps annotated to read coordinates; None is the identity and keeps every
    coordinate to the last bit.
    """

    width: int
    height: int
    matrix: np.ndarray | None = None

    def points(self, points: np.ndarray) -> np.ndarray:
        """Map (N, 2) float points."""
        if self.matrix is None:
            return points
        mapped: np.ndarray = points @ self.matrix[:, :2].T + self.matrix[:, 2]
        return mapped

    def box(self, box: Sequence[float]) -> list[float]:
        """Map a box (x0, y0, x1, y1) to the box around its mapped corners."""
        if self.matrix is None:
            return list(box)
        corners = self.points(np.asarray(box, dtype=np.float64).reshape(2, 2))
        return [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]


def _turned(header: ImageHeader) -> np.ndarray:
    """The matrix of a quarter turn (EXIF orientation 5 to 8) from the stored frame."""
    w, h = header.stored
    return np.array(
        {
            5: [[0, 1, 0], [1, 0, 0]],
            6: [[0, -1, h], [1, 0, 0]],
            7: [[0, -1, h], [-1, 0, w]],
            8: [[0, 1, 0], [-1, 0, w]],
        }[header.orientation],
        dtype=np.float64,
    )


def find_frame(
    header: ImageHeader,
    size: tuple[int, int] | None,
    boxes: Sequence[Sequence[float]],
    *,
    report: DatasetReport,
    file: str,
) -> Frame | None:
    """Decide in which frame an image was annotated.

    Args:
        header: the image file's header.
        size: (width, height) that the annotation states, None if it states none.
        boxes: the annotated boxes (x0, y0, x1, y1), counted from 0.
        report: records corrections under ``file``.

    Returns:
        The way into the frame that Detectron2 reads; None, and the image must be skipped, if the
        annotated frame is ambiguous.
    """
    shown, stored = header.shown, header.stored
    if size is None:
        report.add("size missing", file, action="taken from the image file")
        size = shown
    if size == shown:
        if header.orientation != 1 and shown == stored:
            kind = "EXIF rotation in a frame that the annotated size does not tell"
            report.add(kind, file, action="boxes kept as they are")
        return Frame(*shown)
    if size == stored:
        report.add("EXIF rotation", file, action="objects turned with the image")
        return Frame(*shown, matrix=_turned(header))
    found = f"annotated size {size[0]}x{size[1]}, the file's is {shown[0]}x{shown[1]}"
    extent = np.max([box[2:] for box in boxes], axis=0) if len(boxes) else np.zeros(2)
    fits = bool((extent <= np.asarray(shown) + 1).all())
    same_shape = abs(size[0] * shown[1] - size[1] * shown[0]) <= max(*size, *shown)
    if fits and (not same_shape or not len(boxes)):
        report.add("size differs", file, found, action="the file's size taken, boxes kept")
        return Frame(*shown)
    if same_shape and not fits and bool((extent <= np.asarray(size) + 1).all()):
        report.add("size differs", file, found, action="boxes scaled to the file's size")
        x, y = shown[0] / size[0], shown[1] / size[1]
        return Frame(*shown, matrix=np.array([[x, 0, 0], [0, y, 0]], dtype=np.float64))
    report.add("size differs", file, found, action="image skipped, its frame cannot be told")
    return None


def mend_box(
    box: Sequence[float], frame: Frame, *, report: DatasetReport, file: str, obj: str
) -> list[float] | None:
    """Clip a box (x0, y0, x1, y1) to its image; None if nothing of it remains."""
    x0, y0, x1, y1 = box
    if 0 <= x0 < x1 <= frame.width and 0 <= y0 < y1 <= frame.height:  # nearly all
        return [float(x0), float(y0), float(x1), float(y1)]
    if not all(map(math.isfinite, box)):
        report.add("box unreadable", file, obj, action="object skipped")
        return None
    if x1 <= x0 or y1 <= y0:
        report.add("box empty", file, obj, action="object skipped")
        return None
    inside = [max(x0, 0.0), max(y0, 0.0), min(x1, frame.width), min(y1, frame.height)]
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        report.add("box outside the image", file, obj, action="object skipped")
        return None
    beyond = max(abs(a - b) for a, b in zip(inside, box, strict=True))
    if beyond > ROUNDING:
        report.add("box partly outside the image", file, obj, action="clipped to the image")
    elif beyond > COUNTED:
        report.rounded += 1
    return [float(value) for value in inside]


def ordered_corners(
    corners: Sequence[float], *, report: DatasetReport, file: str, obj: str
) -> list[float] | None:
    """A box (x0, y0, x1, y1), as an annotation states it, with its corners in order.

    None, and the object must be skipped, where the box is empty, or lies between 0 and 1 in a data
    set of pixels.
    """
    x0, y0, x1, y1 = corners
    if x1 == x0 or y1 == y0:
        report.add("box empty", file, obj, action="object skipped")
        return None
    if min(corners) >= 0 and max(corners) <= 1:
        report.add("box between 0 and 1, not in pixels", file, obj, action="object skipped")
        return None
    if x1 < x0 or y1 < y0:  # the same box from its other corners
        report.add("box corners swapped", file, obj, action="put in order")
    return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]

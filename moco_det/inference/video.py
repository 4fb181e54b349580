"""Reading and writing videos frame by frame with OpenCV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from moco_common.errors import UserError
from moco_common.files import new_beside, open_regular, put_in_place

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg"})
LEAST_SHARE = 0.95  # of the stated frames; the headers of containers are off by a few


def is_video(path: str | Path) -> bool:
    """Return True if a file has the suffix of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def _open(path: str | Path) -> cv2.VideoCapture:
    """Open a video file; OpenCV itself would wait for a pipe, and follow a playlist to other files.

    Raises:
        UserError: it is no regular file, or is text, which no video begins with.
    """
    try:
        with open_regular(path, most=None) as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if b"\0" not in head:
        raise UserError(f"{path} is not readable as a video: convert it, for example to H.264 MP4")
    return cv2.VideoCapture(str(path))


def video_facts(path: str | Path) -> tuple[float, int]:
    """Frames per second and number of frames by the header; 25 and 0 where it has none."""
    try:
        capture = _open(path)
    except UserError:  # which `read_frames` reports
        return 25.0, 0
    rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    capture.release()
    return (rate if 0 < rate < 1000 else 25.0), max(0, int(count))


def read_frames(path: str | Path) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of a video, RGB (H, W, 3) uint8.

    Raises:
        UserError: the video cannot be opened, or ends early (after the frames that can be read).
    """
    capture = _open(path)
    stated = video_facts(path)[1]
    count = 0
    try:
        while True:
            there, frame = capture.read()
            if not there:
                break
            count += 1
            yield np.ascontiguousarray(frame[:, :, ::-1])
    finally:
        capture.release()
    if not count:
        raise UserError(f"{path} is not readable as a video: convert it, for example to H.264 MP4")
    if count < LEAST_SHARE * stated:
        raise UserError(
            f"{path} ends early, after {count} of {stated} frames, and so do its results: copy or "
            "convert it again"
        )


class VideoFile:
    """A video file that appears under its name when the block ends.

    If the block raises a UserError, such as for a source that ends early, the frames so far are
    kept; any other exception discards them.
    """

    def __init__(self, path: str | Path, rate: float) -> None:
        self._path, self._rate = Path(path), rate
        self._writer: cv2.VideoWriter | None = None
        self._frames = 0

    def __enter__(self) -> VideoFile:
        self._unfinished = new_beside(self._path, suffix=".mp4")
        return self

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Append an RGB frame (H, W, 3); all must have the same size.

        Raises:
            UserError: this OpenCV cannot write videos.
        """
        if self._writer is None:
            size = (frame.shape[1], frame.shape[0])
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._unfinished), code, self._rate, size)
            if not self._writer.isOpened():
                raise UserError(
                    f"cannot write {self._path}: this OpenCV lacks FFmpeg; install "
                    "opencv-python-headless"
                )
        self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
        self._frames += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.release()
        if self._frames and (kind is None or issubclass(kind, UserError)):
            put_in_place(self._unfinished, self._path)
        else:
            self._unfinished.unlink(missing_ok=True)

"""Videos in and out, frame by frame, by OpenCV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from moco_common.errors import UserError
from moco_common.files import new_beside, put_in_place

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg"})
LEAST_SHARE = 0.95  # of the frames that a file states; containers miscount by a few


def is_video(path: str | Path) -> bool:
    """Whether a file's name is that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def video_facts(path: str | Path) -> tuple[float, int]:
    """(frames a second, number of frames) as the file states them; 25 and 0 where it does not."""
    capture = cv2.VideoCapture(str(path))
    rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    capture.release()
    return (rate if 0 < rate < 1000 else 25.0), max(0, int(count))


def read_frames(path: str | Path) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video, RGB (H, W, 3) uint8.

    Raises:
        UserError: it cannot be opened, or breaks off early (after what could be read).
    """
    capture = cv2.VideoCapture(str(path))
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
            f"{path} breaks off after {count} of {stated} frames: its results end there too"
        )


class VideoFile:
    """A video being written, under its name once the block ends.

    A UserError, as of a source that breaks off, keeps the frames so far; anything else keeps none.
    """

    def __init__(self, path: str | Path, rate: float) -> None:
        self._path, self._rate = Path(path), rate
        self._writer: cv2.VideoWriter | None = None
        self._frames = 0

    def __enter__(self) -> VideoFile:
        self._unfinished = new_beside(self._path, suffix=".mp4")
        return self

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Append an RGB frame (H, W, 3); all must be of one size.

        Raises:
            UserError: OpenCV cannot write videos here.
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

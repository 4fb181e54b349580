"""Frames of a video as a source of images: ``video:FILE?every=N&threshold=T``.

The frames are extracted once, into a folder of JPEG files in the user's cache, and read from there
like any folder. They are numbered, so a resumed run sees the same images in the same order.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import cv2
import numpy as np

from moco_common.errors import UserError
from moco_common.files import full_disk_explained

EVERY = 30  # about a second of most videos
THRESHOLD = 2.0  # of 255 levels; the noise of a still camera is below it
_SIDE = 32  # of the grey thumbnails that are compared
_QUALITY = 95


class Frames(NamedTuple):
    """The extracted frames of a video.

    Attributes:
        folder: where they are.
        names: their file names, in the order of the video.
        note: how many were used and dropped, for the log.
    """

    folder: Path
    names: list[str]
    note: str


def parse_spec(spec: str) -> tuple[Path, int, float]:
    """Split ``FILE?every=N&threshold=T``, without ``video:``, into file, N and T.

    Raises:
        UserError: a setting is unknown or out of range, or the file is missing.
    """
    name, _, query = spec.rpartition("?") if "?" in spec and "=" in spec else (spec, "", "")
    advice = "write video:FILE?every=N&threshold=T"
    values = {"every": str(EVERY), "threshold": str(THRESHOLD)}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in values:
            raise UserError(f"video:{spec} has an unknown setting {key}: {advice}.")
        values[key] = value
    try:
        every, threshold = int(values["every"]), float(values["threshold"])
    except ValueError:
        every, threshold = 0, 0.0
    if every < 1 or not 0 <= threshold <= 255:
        raise UserError(
            f"video:{spec} needs a whole number `every` of at least 1 and a `threshold` from 0 to "
            f"255: {advice}."
        )
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"video:{spec}: {path} is not a file; {advice}.")
    return path, every, threshold


def extract_frames(spec: str) -> Frames:
    """Extract every N-th frame, or find those that an earlier run has extracted.

    A frame is dropped as a near-duplicate if it differs from the last one kept by less than the
    threshold, in the mean over grey thumbnails of 32 pixels. Several processes may call this at
    the same time; one of them extracts.

    Args:
        spec: ``FILE?every=N&threshold=T``.

    Raises:
        UserError: OpenCV cannot read the video, the cache cannot be written, or the disk is full.
    """
    path, every, threshold = parse_spec(spec)
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {every} {threshold} {_QUALITY}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moco-det" / "video"
    folder = cache / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with full_disk_explained(folder), open(f"{folder}.lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _extract(path, every, threshold, folder)
    except OSError as error:
        raise UserError(
            f"The frames of {path} cannot be written to {cache} ({error.strerror}): set the "
            f"environment variable XDG_CACHE_HOME to a folder with space."
        ) from None
    names = sorted(name for name in os.listdir(folder) if name.endswith(".jpg"))
    considered = int((folder / "considered.txt").read_text())
    note = f"{len(names)} frames used, one in {every}, {considered - len(names)} near-duplicates"
    return Frames(folder, names, f"{note} dropped (cached in {folder})")


def _extract(path: Path, every: int, threshold: float, folder: Path) -> None:
    """Write the frames to a temporary folder that takes its name when it is complete."""
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        considered, last = 0, None
        for number, frame in _frames(path, every):
            considered += 1
            small = _thumbnail(frame)
            if last is not None and float(np.abs(small - last).mean()) < threshold:
                continue
            last = small
            encoded = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1]
            (part / f"{number:09d}.jpg").write_bytes(encoded.tobytes())
        if not considered:
            raise UserError(
                f"OpenCV reads no frame from {path}: check that it is a video and not damaged, or "
                f"convert it to MP4 (H.264) first."
            )
        (part / "considered.txt").write_text(f"{considered}\n")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _frames(path: Path, every: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield number and content of every N-th frame, BGR uint8 (H, W, 3)."""
    video = cv2.VideoCapture(str(path))
    try:
        number = 0
        while video.grab():  # advances without decoding to pixels
            if number % every == 0:
                decoded, frame = video.retrieve()
                if decoded:
                    yield number, frame
            number += 1
    finally:
        video.release()


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
    return cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)

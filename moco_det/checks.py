"""What is checked while a data set is read (the annotation's frame, boxes) and when it has been
evaluated, by all ranks together: that every image counts once.

Nothing here knows a file format. A reader asks these functions and notes every mend in a
:class:`DatasetReport`: mended where the mend is certain, skipped otherwise, named either way.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from detectron2.utils import comm

from moco_det.errors import UserError
from moco_det.files import replace_text
from moco_det.headers import ImageHeader
from moco_det.wording import counted

logger = logging.getLogger(__name__)

Share = TypeVar("Share")  # what one rank has seen, as an evaluator keeps it
PREDICTIONS_FILE = "coco_instances_results.json"  # Detectron2's name for COCO's result format
ROUNDING = 0.01  # pixels: a box that leaves the image by less is rounding, not a mistake


@dataclass(frozen=True)
class Finding:
    """One thing wrong in a data set, and what was done about it."""

    kind: str
    file: str
    object: str  # "object 3 (RBC)", counted from 1 in the file's order; "" for the whole file
    action: str


@dataclass
class DatasetReport:
    """What a reader found: the size of the data set and everything wrong in it, each once."""

    spec: str
    images: int = 0
    objects: int = 0
    images_without_objects: int = 0
    classes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, file: object, obj: str = "", *, action: str) -> None:
        """Note what is wrong with a file, or with an object in it, and what was done about it."""
        self.findings.append(Finding(kind, str(file), obj, action))

    def groups(self) -> dict[tuple[str, str], list[Finding]]:
        """Findings by (kind, action), in the order in which they were first met."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.kind, finding.action), []).append(finding)
        return groups

    def summary(self) -> str:
        """One line about the data set, then one for each kind of finding with its first case."""
        shown = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        images, objects = counted(self.images, "image", ","), counted(self.objects, "object", ",")
        lines = [
            f"{self.spec}: {images} ({self.images_without_objects:,} without objects), {objects}, "
            f"{counted(len(self.classes), 'class')} ({shown})"
        ]
        for (kind, action), found in self.groups().items():
            where = found[0].file + (f", {found[0].object}" if found[0].object else "")
            first = "first: " if len(found) > 1 else ""
            lines.append(f"  {len(found):,} x {kind}: {action} ({first}{where})")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Counts and all findings, as plain values."""
        counts = [
            {"kind": kind, "action": action, "count": len(found)}
            for (kind, action), found in self.groups().items()
        ]
        return {**asdict(self), "counts": counts}

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`as_dict` as JSON, atomically."""
        write_json_atomically(path, self.as_dict())


def write_json_atomically(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as JSON so that ``path`` holds either the old or the whole new file."""
    # One string at once: json.dump would go through the slow pure-Python encoder.
    replace_text(Path(path), json.dumps(content))


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's cyclic collector from walking all the objects of a large data set, again and
    again while they are made: none of them is garbage, and it takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
    report: DatasetReport,
    file: str,
) -> Frame | None:
    """Decide in which frame an image was annotated.

    Args:
        header: the image file's header.
        size: (width, height) that the annotation states, None if it states none.
        boxes: the annotated boxes (x0, y0, x1, y1), counted from 0.
        report: where a mend is noted, under ``file``.

    Returns:
        The way into the frame that Detectron2 reads, or None if it cannot be told: skip the image.
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
    box: Sequence[float], frame: Frame, report: DatasetReport, file: str, obj: str
) -> list[float] | None:
    """Clip a box (x0, y0, x1, y1) to its image. None if nothing is left of it: skip the object."""
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
    if max(abs(a - b) for a, b in zip(inside, box, strict=True)) > ROUNDING:
        report.add("box partly outside the image", file, obj, action="clipped to the image")
    return [float(value) for value in inside]


def shares_of_ranks(share: Share, distributed: bool) -> list[Share] | None:
    """What every rank has gathered for itself, in rank order, on the first rank; None elsewhere.

    Args:
        distributed: False where each rank evaluates alone: its own share only. If True, all ranks
            must call.
    """
    if not distributed:
        return [share]
    shares = comm.gather(share, dst=0)
    return shares if comm.is_main_process() else None


def images_once(
    dataset_name: str, seen: Sequence[Any], expected: Iterable[Any] | None = None
) -> list[int]:
    """Which of the evaluated images count, each once: a repeated one would change the metric.

    A sampler that fills up the shares of its processes gives some images to two of them; only
    the first of equal ones is taken, and a warning says how many were not.

    Args:
        seen: the image ids in the order of their predictions, of all processes.
        expected: the data set's image ids.

    Returns:
        Indices into ``seen``, in the order of ``expected`` (of ``seen`` where there is none), so
        that what follows does not depend on how the images were shared out.

    Raises:
        UserError: an image is unknown, or was not evaluated.
    """
    first: dict[Any, int] = {}
    for index, image in enumerate(seen):
        first.setdefault(image, index)
    if len(first) < len(seen):
        logger.warning(
            f"{len(seen) - len(first)} images of {dataset_name} were evaluated more than once: "
            "each counts once"
        )
    if expected is None:
        return list(first.values())
    known = dict.fromkeys(expected)
    unknown = [image for image in first if image not in known]
    lost = [image for image in known if image not in first]
    if unknown:
        raise UserError(f"image {unknown[0]} is not of {dataset_name}: evaluate on its own loader")
    if lost:
        raise UserError(
            f"{len(lost)} of {len(known)} images of {dataset_name} were not evaluated (first: "
            f"{lost[0]}): run the model over the whole data set"
        )
    return [first[image] for image in known]

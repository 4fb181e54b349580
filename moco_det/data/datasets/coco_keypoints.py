"""Keypoints as COCO files hold them: names and skeleton in the categories, points in the objects.

A point is (x, y, visibility): 0 not labelled, 1 labelled but hidden, 2 visible. Files hold pixel
indices, Detectron2's dicts the centres of these pixels, half a pixel further.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moco_det.data.datasets.findings import DatasetReport
from moco_det.data.datasets.image_frame import Frame

BONE_COLOR = (86, 180, 233)  # RGB


@dataclass(frozen=True)
class Skeleton:
    """The K names of a data set's keypoints, and which of them are joined, as pairs of indices."""

    names: tuple[str, ...]
    bones: tuple[tuple[int, int], ...] = ()

    def metadata(self) -> dict[str, Any]:
        """Return what Detectron2 looks up: names, and the pairs that a flip swaps."""
        names = self.names
        return {
            "keypoint_names": names,
            "keypoint_flip_map": tuple(flip_map(names)),
            "keypoint_connection_rules": [(names[a], names[b], BONE_COLOR) for a, b in self.bones],
        }


def read_skeleton(
    categories: list[Any], annotations: list[Any], file: str, report: DatasetReport
) -> Skeleton | None:
    """The skeleton that the categories share; None where the file has no keypoints to use.

    Where no category names them, the keypoints of the objects are numbered.
    """
    entries = [c for c in categories if isinstance(c, dict) and c.get("keypoints")]
    found = {_names(entry["keypoints"]): entry for entry in entries}
    if None in found:
        report.add("keypoint names unreadable", file, action="keypoints not read")
        return None
    if len(found) > 1:
        report.add("several kinds of keypoints", file, action="keypoints not read")
        return None
    for names, entry in found.items():
        assert names is not None
        return Skeleton(names, _bones(entry.get("skeleton"), len(names), file, report))
    lengths = {
        len(a["keypoints"])
        for a in annotations
        if isinstance(a, dict) and isinstance(a.get("keypoints"), list) and a["keypoints"]
    }
    if not lengths:
        return None
    count = max(lengths) // 3
    if len(lengths) > 1 or max(lengths) != 3 * count:
        report.add("keypoints of several numbers, without names", file, action="not read")
        return None
    report.add("keypoint names missing", file, action="numbered; a flip swaps none of them")
    return Skeleton(tuple(f"keypoint {number}" for number in range(1, count + 1)))


def read_keypoints(
    entry: dict[str, Any],
    count: int,
    frame: Frame,
    *,
    report: DatasetReport,
    file: str,
    obj: str,
) -> list[float]:
    """An object's ``count`` keypoints in Detectron2's form, [x, y, visibility] one after another.

    Objects without keypoints (crowds, and categories that have none) get unlabelled ones.
    """
    given = entry.get("keypoints")
    if not given:
        return [0.5, 0.5, 0.0] * count
    try:
        points = np.asarray(given, dtype=np.float64).reshape(count, 3)
    except (TypeError, ValueError, OverflowError):
        points = np.full((1, 3), np.nan)
    known = np.isin(points[:, 2], (0, 1, 2)).all()
    if not known or not np.abs(points).max(initial=0) < 1e9:  # also if NaN
        report.add("keypoints unreadable", file, obj, action="taken as not labelled")
        return [0.5, 0.5, 0.0] * count
    labelled = points[:, 2] > 0
    stated = entry.get("num_keypoints")
    if stated is not None and not (isinstance(stated, int) and stated == labelled.sum()):
        report.add("num_keypoints differs from the keypoints", file, obj, action="counted anew")
    place = frame.points(points[:, :2] + 0.5)
    outside = labelled & ((place < 0) | (place > (frame.width, frame.height))).any(axis=1)
    for number in np.flatnonzero(outside) + 1:
        kind = "keypoint outside the image"
        report.add(kind, file, f"{obj}, keypoint {number}", action="taken as not labelled")
    points = np.concatenate([place, np.where(outside, 0, points[:, 2])[:, None]], axis=1)
    points[outside, :2] = 0.5
    return [float(value) for value in points.ravel()]


def _names(value: Any) -> tuple[str, ...] | None:
    """The names if they are unique, else None."""
    if not isinstance(value, list) or not all(isinstance(n, str) and n.strip() for n in value):
        return None
    names = tuple(name.strip() for name in value)
    return names if len(set(names)) == len(names) else None


def _bones(value: Any, count: int, file: str, report: DatasetReport) -> tuple[tuple[int, int], ...]:
    """Pairs of numbers from 1 on, as pairs of indices."""
    bones = []
    for bone in value if isinstance(value, list) else []:
        ends = bone if isinstance(bone, list) and len(bone) == 2 else []
        if ends and all(isinstance(end, int) and 1 <= end <= count for end in ends):
            bones.append((ends[0] - 1, ends[1] - 1))
        else:
            report.add("bone of the skeleton unreadable", file, str(bone)[:40], action="left out")
    return tuple(bones)


# One letter for a side, at an end of the name or before a capital: l_eye, eye_r, LEye.
_SIDE = re.compile(r"^[lr](?=_)|(?<=_)[lr]$|^[LR](?=_|[A-Z])|(?<=_)[LR]$")
_OTHER_SIDE = {"l": "r", "r": "l", "L": "R", "R": "L"}


def flip_map(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which keypoints a horizontal flip swaps: those named alike but for left and right.

    ``["nose", "left_eye", "right_eye"]`` -> ``[("left_eye", "right_eye")]``; also ``eye_l`` and
    ``eye_r``, ``LEye`` and ``REye``.
    """
    known = set(names)
    pairs = []
    for name in names:
        for left, right in (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")):
            if left in name and (other := name.replace(left, right)) in known:
                pairs.append((name, other))
                break
        else:
            mirrored = _SIDE.sub(lambda side: _OTHER_SIDE[side.group()], name)
            if mirrored != name and mirrored in known and name not in {b for _, b in pairs}:
                pairs.append((name, mirrored))
    return pairs

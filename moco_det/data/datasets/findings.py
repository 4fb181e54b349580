"""Findings: faults in a data set, and how each was handled."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from moco_common.files import write_json_atomically
from moco_common.text import counted

# Kinds that follow from another finding, such as that of the image.
CONSEQUENCES = frozenset({"annotation without a usable image"})


@dataclass(frozen=True)
class Finding:
    """One fault in a data set, and how it was handled."""

    kind: str
    file: str
    object: str  # "object 3 (RBC)", counted from 1 in the file's order; "" for the whole file
    action: str


@dataclass
class DatasetReport:
    """The size of a data set and all its faults, each once."""

    spec: str
    images: int = 0
    objects: int = 0
    images_without_objects: int = 0
    classes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    rounded: int = 0  # boxes that rounding moved up to half a pixel out of their images
    notes: list[str] = field(default_factory=list)  # what a reader should know and is no fault

    def add(self, kind: str, file: object, obj: str = "", *, action: str) -> None:
        """Record a fault of a file, or of an object in it, and how it was handled."""
        self.findings.append(Finding(kind, str(file), obj, action))

    def groups(self) -> dict[tuple[str, str], list[Finding]]:
        """Findings by (kind, action), in order of first occurrence, causes before consequences."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.kind, finding.action), []).append(finding)
        return dict(sorted(groups.items(), key=lambda group: group[0][0] in CONSEQUENCES))

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
        if self.rounded:
            boxes = counted(self.rounded, "box", ",")
            lines.append(f"  note: rounding puts {boxes} up to half a pixel outside, clipped")
        lines += [f"  note: {note}" for note in self.notes]
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


class SemanticReport(DatasetReport):
    """A report that counts images and classes; there are no objects."""

    def summary(self) -> str:
        """One line about the data set, then one for each kind of finding with its first case."""
        images, classes = counted(self.images, "image", ","), counted(len(self.classes), "class")
        first = f"{self.spec}: {images} with labels, {classes}"
        return "\n".join([first, *super().summary().splitlines()[1:]])


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector while a large data set is built: it would walk all
    the new objects repeatedly, find no garbage, and take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

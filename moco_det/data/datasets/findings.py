"""Findings: what is wrong in a data set, and what was done about it."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from moco_common.files import write_json_atomically
from moco_common.text import counted


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

"""The findings of an inspection, and the files written from them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moco_common.figures import save_figure
from moco_common.files import replace_file, replace_text
from moco_common.html_page import render_page
from pretrain.inspection.geometry import Geometry
from pretrain.inspection.run_directory import InspectedRun


@dataclass
class Findings:
    """Everything an inspection has found; pictures are written immediately.

    Attributes:
        folder: output directory, which exists.
        lines: name of a quantity -> its values as text.
        sentences: conclusions drawn from them.
        numbers: entries of ``summary.json``.
        pictures: caption -> file name.
        geometries: name of a set of vectors -> its geometry.
    """

    folder: Path
    lines: dict[str, str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    geometries: dict[str, Geometry] = field(default_factory=dict)

    def draw(self, caption: str, name: str, picture: Figure | bytes) -> None:
        """Write a picture (a figure or an encoded PNG) and record its caption."""
        path = self.folder / name
        if isinstance(picture, bytes):
            replace_file(path, lambda file: file.write(picture))
        else:
            save_figure(picture, path)
        self.pictures[caption] = name

    def add_geometry(self, name: str, geometry: Geometry) -> None:
        """Record a geometry and its summary line."""
        self.geometries[name] = geometry
        self.lines[name] = geometry.line()

    def write(self, run: InspectedRun) -> dict[str, Any]:
        """Write ``summary.json``, ``summary.txt`` and ``index.html``.

        Returns:
            The content of ``summary.json``, with ``text`` (the content of ``summary.txt``) and
            ``folder`` added.
        """
        title = f"{run.path or run.folder}: {run.cfg.METHOD}, ResNet-{run.cfg.MODEL.DEPTH} width "
        title += f"{run.cfg.MODEL.WIDTH:g}, iteration {run.step}"
        sentences = [*run.notes, *self.sentences]
        content = {
            "run": str(run.folder),
            "checkpoint": str(run.path) if run.path else None,
            "method": run.cfg.METHOD,
            "step": run.step,
            "version": run.state["version"] if run.state else None,
            **self.numbers,
            "geometry": {name: g.as_dict() for name, g in self.geometries.items()},
            "findings": sentences,
            "pictures": self.pictures,
        }
        width = max(map(len, self.lines), default=0)
        lines = [title, "", *(f"{name:<{width}}  {text}" for name, text in self.lines.items())]
        text = "\n".join([*lines, "", *(f"- {sentence}" for sentence in sentences)]) + "\n"
        replace_text(self.folder / "summary.json", json.dumps(content, indent=1) + "\n")
        replace_text(self.folder / "summary.txt", text)
        pictures = {caption: self.folder / name for caption, name in self.pictures.items()}
        page = render_page(
            Path(__file__).with_name("inspection.html.j2"),
            title=title,
            lines=self.lines,
            findings=sentences,
            pictures=pictures,
        )
        replace_text(self.folder / "index.html", page)
        return content | {"text": text, "folder": str(self.folder)}

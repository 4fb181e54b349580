"""The report of a conversion: what happened to each tensor, notes, warnings and the proof."""

from __future__ import annotations

from dataclasses import dataclass, field

from moco_common.backbone.accounting import Entry, dropped, summary
from moco_common.backbone.architecture import Architecture
from moco_det.conversion.proof import Proof


@dataclass
class Report:
    """The report of a conversion; the command line prints its ``str()``."""

    source: str
    encoder: str
    prefix: str
    encoders: tuple[str, ...]
    architecture: Architecture
    target: str
    entries: list[Entry]
    warnings: list[str]
    notes: list[str] = field(default_factory=list)
    proof: Proof | None = None

    @property
    def mapped(self) -> int:
        """Number of tensors in the converted network."""
        return sum(entry.target is not None for entry in self.entries)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped tensors by reason."""
        return dropped(self.entries)

    def table(self) -> str:
        """Return one line per tensor of the file."""
        width = max(len(entry.name) for entry in self.entries)
        return "\n".join(
            f"{e.name:<{width}}  {'x'.join(map(str, e.shape)) or 'scalar':<16} "
            + (f"-> {e.target}" if e.target else f"dropped: {e.reason}")
            for e in self.entries
        )

    def __str__(self) -> str:
        where = f" under {self.prefix!r}" if self.prefix else ""
        choice = f", one of {' and '.join(self.encoders)}" if len(self.encoders) > 1 else ""
        lines = [
            f"source        {self.source}, the {self.encoder} encoder{where}{choice}",
            f"architecture  {self.architecture}",
            f"tensors       {summary(self.entries, f'mapped to {self.target}')}",
            *(f"note          {note}" for note in self.notes),
            *(f"warning       {warning}" for warning in self.warnings),
        ]
        lines.append(str(self.proof) if self.proof else "proof         not requested")
        return "\n".join(lines)

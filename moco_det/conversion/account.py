"""The report of a conversion: what happened to each tensor, and unusual values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moco_det.conversion.architecture import Architecture
from moco_det.conversion.proof import Proof


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, either mapped to the name ``target`` or dropped for a ``reason``."""

    name: str
    shape: tuple[int, ...]
    target: str | None = None
    reason: str | None = None


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
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    proof: Proof | None = None

    @property
    def mapped(self) -> int:
        """Number of tensors in the converted network."""
        return sum(entry.target is not None for entry in self.entries)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped tensors by reason."""
        return dict(Counter(entry.reason for entry in self.entries if entry.reason))

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
        dropped = ", ".join(f"{count} {why}" for why, count in self.dropped.items())
        total = sum(self.dropped.values())
        lines = [
            f"source        {self.source}, the {self.encoder} encoder{where}{choice}",
            f"architecture  {self.architecture}",
            f"tensors       {len(self.entries)} read, {self.mapped} mapped to {self.target}, "
            f"{total} dropped" + (f" ({dropped})" if dropped else ""),
            *(f"note          {note}" for note in self.notes),
            *(f"warning       {warning}" for warning in self.warnings),
        ]
        lines.append(str(self.proof) if self.proof else "proof         not requested")
        return "\n".join(lines)


def odd_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Describe tensors with NaN, infinite or only zero values, and norms that never saw a batch."""
    broken, zero = [], []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            broken.append(f"{name} ({count} of {tensor.numel()})")
        elif name.endswith(".weight") and not tensor.any():
            zero.append(name)
    norms = [name.removesuffix("running_mean") for name in tensors if name.endswith("running_mean")]
    untouched = [
        norm
        for norm in norms
        if not tensors[f"{norm}running_mean"].any() and (tensors[f"{norm}running_var"] == 1).all()
    ]
    findings = []
    if broken:
        findings.append(f"NaN or infinite values in {_some(broken)}")
    if zero:
        findings.append(f"all-zero weights in {_some(zero)}")
    if untouched:
        findings.append(
            f"running statistics of {len(untouched)} of {len(norms)} norms were never updated "
            f"(mean 0, variance 1): {_some([n.rstrip('.') for n in untouched])}"
        )
    return findings


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

"""Embeddings of past batches that a method keeps (a queue, a bank), and the use of prototypes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moco_common.text import counted
from pretrain.inspection.geometry import Geometry, judge, measure
from pretrain.methods.base import Memory, Method

MOST = 65536  # largest number of keys that are measured; of more, a random sample is taken


@dataclass(frozen=True)
class Dictionary:
    """A method's memory, measured.

    Attributes:
        memory: the memory as the method describes it.
        age: steps since the oldest embedding was written.
        turned: fraction of the key encoder that newer query encoders have replaced in these steps,
            1 - m^age; None without a momentum encoder.
        geometry: geometry of the embeddings; None for fewer than two.
    """

    memory: Memory
    age: int
    turned: float | None
    geometry: Geometry | None

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        values = {
            "kind": self.memory.kind,
            "size": self.memory.size,
            "filled": self.memory.filled,
            "pointer": self.memory.pointer,
            "oldest_key_steps": self.age,
            "key_encoder_replaced": self.turned,
        }
        return values | {"geometry": self.geometry.as_dict() if self.geometry else None}

    def line(self) -> str:
        """Format the figures in one line."""
        parts = [f"{self.memory.filled} of {self.memory.size} places filled"]
        if self.memory.pointer is not None:
            parts.append(f"next key at {self.memory.pointer}")
        parts.append(f"oldest key {counted(self.age, 'step')} old")
        if self.turned is not None:
            parts.append(f"{self.turned:.0%} of the key encoder replaced since")
        return ", ".join(parts)

    def findings(self) -> list[str]:
        """Return conclusions from the figures, one sentence each."""
        memory, found = self.memory, list(self.memory.notes)
        if self.geometry:
            found.append(judge(self.geometry, "keys")[1])
        if memory.filled < memory.size:
            found.append(
                f"the {memory.kind} is not full yet ({memory.filled} of {memory.size}): the rest "
                f"still holds its initial values, which are easy to tell from images, so the "
                f"accuracy means little."
            )
        if self.turned is not None and self.turned > 0.9:
            found.append(
                f"the oldest keys come from a different encoder ({self.turned:.0%} of it was "
                f"replaced since): {memory.stale}."
            )
        return found


def dictionary_of(method: Method, step: int, batch_size: int) -> Dictionary | None:
    """Measure the memory of a method after ``step`` steps; None for a method that keeps nothing."""
    memory = method.memory(step, batch_size)
    if memory is None:
        return None
    age = min(step, math.ceil(memory.size / batch_size))
    turned = None if memory.momentum is None else 1.0 - memory.momentum**age
    keys = memory.vectors
    if len(keys) > MOST:
        generator = torch.Generator().manual_seed(0)
        keys = keys[torch.randperm(len(keys), generator=generator)[:MOST]]
    return Dictionary(memory, age, turned, measure(keys) if len(keys) > 1 else None)


def prototype_use(embeddings: Tensor, prototypes: Tensor) -> dict[str, Any]:
    """Measure how evenly embeddings are distributed over their nearest prototypes.

    Args:
        embeddings: (N, C), not necessarily normalised.
        prototypes: (P, C), not necessarily normalised.

    Returns:
        ``prototypes``, P; ``used``, the number that are nearest to at least one embedding;
        ``perplexity``, exp of the entropy of their shares, from 1 to min(N, P); ``largest_share``;
        and ``mean_cosine`` between prototypes.
    """
    z, centres = (torch.nn.functional.normalize(x.float(), dim=1) for x in (embeddings, prototypes))
    counts = torch.bincount((z @ centres.T).argmax(1), minlength=len(centres)).double()
    shares = counts / counts.sum()
    return {
        "prototypes": len(centres),
        "used": int((counts > 0).sum()),
        "perplexity": torch.special.entr(shares).sum().exp().item(),
        "largest_share": shares.max().item(),
        "mean_cosine": measure(centres).mean_cosine if len(centres) > 1 else 1.0,
    }


def judge_prototypes(use: dict[str, Any], images: int, remedy: str) -> str:
    """Word the result of `prototype_use` for ``images`` images in a sentence.

    Args:
        remedy: what to do if the assignments have collapsed.
    """
    most = min(images, use["prototypes"])
    figures = (
        f"{use['used']} of {use['prototypes']} prototypes are nearest to some of {images} images "
        f"(perplexity {use['perplexity']:.0f})"
    )
    if use["used"] < 2 or use["perplexity"] < 0.02 * most:
        return f"{figures}: the assignments have collapsed. {remedy}"
    if use["perplexity"] < 0.1 * most:
        return f"{figures}: a few clusters contain most of the images."
    return f"{figures}: the clusters are in use."

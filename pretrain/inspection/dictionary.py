"""The keys that a method remembers: a queue, a bank, past embeddings, or none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moco_common.text import counted
from pretrain.inspection.geometry import Geometry, judge, measure
from pretrain.inspection.run_directory import InspectedRun
from pretrain.methods.memory_bank import ShardedBank

MOST = 65536  # keys measured; of more, as many at random


@dataclass(frozen=True)
class Dictionary:
    """What a run remembers of past batches.

    Attributes:
        kind: "queue", "memory bank" or "queue of embeddings".
        size: K, places.
        filled: places that hold keys and not the noise (or zeros) of the start.
        pointer: where the next key goes; None where there is no such thing.
        age: steps since the oldest key was written.
        turned: share of the key encoder that has been replaced in these steps by newer query
            encoders, 1 - m^age; None without a momentum encoder.
        geometry: of the keys; None while there are fewer than two.
        notes: what does not look as it should.
    """

    kind: str
    size: int
    filled: int
    pointer: int | None
    age: int
    turned: float | None
    geometry: Geometry | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {
            "kind": self.kind,
            "size": self.size,
            "filled": self.filled,
            "pointer": self.pointer,
            "oldest_key_steps": self.age,
            "key_encoder_replaced": self.turned,
        }
        return values | {"geometry": self.geometry.as_dict() if self.geometry else None}

    def line(self) -> str:
        """The figures in one line."""
        parts = [f"{self.filled} of {self.size} places filled"]
        if self.pointer is not None:
            parts.append(f"next key to {self.pointer}")
        parts.append(f"oldest key {counted(self.age, 'step')} old")
        if self.turned is not None:
            parts.append(f"since when {self.turned:.0%} of the key encoder was replaced")
        return ", ".join(parts)

    def findings(self) -> list[str]:
        """What is to be said of it, one sentence each."""
        said = list(self.notes)
        if self.geometry:
            said.append(judge(self.geometry, "keys")[1])
        if self.filled < self.size:
            said.append(
                f"the {self.kind} is not full yet ({self.filled} of {self.size}): the rest is what "
                f"it started with, which is easily told from pictures, so accuracy says little."
            )
        if self.turned is not None and self.turned > 0.9:
            said.append(
                f"the oldest keys come from another encoder ({self.turned:.0%} of it was replaced "
                f"since): raise MOCO.MOMENTUM or shorten MOCO.QUEUE_SIZE."
            )
        return said


def dictionary_of(run: InspectedRun) -> Dictionary | None:
    """What the checkpoint's tensors hold of past batches; None for methods that hold nothing."""
    if run.state is None:
        return None
    state, batch = run.state["state_dict"], int(run.cfg.SOLVER.BATCH_SIZE)
    if "queue_ptr" in state:
        return _ring(run, state["queue"], int(state["queue_ptr"]), batch)
    if "bank._extra_state" in state:
        bank = state["bank._extra_state"]  # NxC
        noise = ShardedBank(len(bank), bank.shape[1], run.cfg.SEED).shard
        written = bank[(bank.cpu().float() != noise).any(1)]
        age = min(run.step, math.ceil(len(bank) / batch))  # an image comes once an epoch
        return Dictionary(
            "memory bank", len(bank), len(written), None, age, None, _geometry(written)
        )
    queue = state.get("queue")
    if isinstance(queue, Tensor) and queue.dim() == 3 and queue.shape[1]:  # of SwAV: 2xLxC
        written = queue[:, queue[0].norm(dim=1) > 0]
        size, filled = queue.shape[1], written.shape[1]
        age = min(run.step, math.ceil(size / batch))
        return Dictionary(
            "queue of embeddings", size, filled, None, age, None, _geometry(written.flatten(0, 1))
        )
    return None


def _ring(run: InspectedRun, queue: Tensor, pointer: int, batch: int) -> Dictionary:
    size, seen, notes = len(queue), run.seen, []
    if pointer != seen % size:
        notes.append(
            f"the queue's pointer is at {pointer}, where {counted(run.step, 'step')} of "
            f"{counted(batch, 'key')} leave it at {seen % size}: the checkpoint "
            f"was put together from several."
        )
    filled = min(seen, size)
    age = min(run.step, math.ceil(size / batch))
    # A queue that is not full yet was filled from its start.
    geometry = _geometry(queue[:filled])
    turned = 1.0 - float(run.cfg.MOCO.MOMENTUM) ** age
    return Dictionary("queue", size, filled, pointer, age, turned, geometry, tuple(notes))


def _geometry(keys: Tensor) -> Geometry | None:
    if len(keys) > MOST:
        generator = torch.Generator().manual_seed(0)
        keys = keys[torch.randperm(len(keys), generator=generator)[:MOST]]
    return measure(keys) if len(keys) > 1 else None


def prototype_use(embeddings: Tensor, prototypes: Tensor) -> dict[str, Any]:
    """Which prototypes are nearest to some embedding, and how evenly.

    Args:
        embeddings: (N, C); prototypes: (P, C). Neither need be normalised.

    Returns:
        ``prototypes`` P; ``used``, those nearest to at least one of the N; ``perplexity``, exp of
        the entropy of their shares, 1 to min(N, P); ``largest_share``; ``mean_cosine`` between
        prototypes.
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


def judge_prototypes(use: dict[str, Any], images: int) -> str:
    """A sentence about `prototype_use` of so many images."""
    most = min(images, use["prototypes"])
    figures = (
        f"{use['used']} of {use['prototypes']} prototypes are nearest to some of {images} images, "
        f"as many as {use['perplexity']:.0f} used evenly"
    )
    if use["used"] < 2 or use["perplexity"] < 0.02 * most:
        return f"{figures}: the assignments have collapsed; lower SWAV.EPSILON or SOLVER.BASE_LR."
    if use["perplexity"] < 0.1 * most:
        return f"{figures}: few clusters take most of the images."
    return f"{figures}: the clusters are in use."

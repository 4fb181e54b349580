"""The distribution of vectors on the sphere, which shows whether a representation has collapsed.

There are two kinds of collapse: all vectors are alike (Chen & He 2021, "Exploring Simple Siamese
Representation Learning", section 4.1, measure it by the standard deviation of each dimension), and
all vectors lie in a few dimensions (Jing et al. 2022, "Understanding Dimensional Collapse in
Contrastive Self-supervised Learning"), which the effective rank shows (Roy & Vetterli 2007, "The
Effective Rank: A Measure of Effective Dimensionality"; for embeddings it is called RankMe, Garrido
et al. 2023).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_common.text import counted
from pretrain.engine.embedding_rank import effective_rank

ALIKE = 0.98  # mean cosine above which vectors count as equal
BUNCHED = 0.5  # mean cosine above which vectors count as gathered in one region
FEW = 0.1  # effective rank, relative to the full rank, below which dimensions count as few
LISTED = 256  # singular values kept for the picture


@dataclass(frozen=True)
class Geometry:
    """Statistics of N vectors of d dimensions.

    Attributes:
        norms: smallest, mean and largest length, before normalisation.
        mean_cosine: mean over all pairs of different vectors: 0 for a uniform distribution on the
            sphere, 1 if all vectors are equal.
        effective_rank: exp of the entropy of the singular values relative to their sum, without
            centring: from 1 to min(N, d).
        std_ratio: standard deviation of a dimension times sqrt(d), averaged over the dimensions: 1
            for a uniform distribution on the sphere, 0 if all vectors are equal.
        dead_dimensions: number of dimensions with a standard deviation below 0.01/sqrt(d).
        spectrum: singular values relative to the largest, in decreasing order.
    """

    count: int
    dim: int
    norms: tuple[float, float, float]
    mean_cosine: float
    effective_rank: float
    std_ratio: float
    dead_dimensions: int
    spectrum: tuple[float, ...]

    @property
    def full_rank(self) -> int:
        """The upper bound of the effective rank."""
        return min(self.count, self.dim)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with five digits and the first `LISTED` singular values."""
        values = asdict(self)
        values["spectrum"] = [round(s, 6) for s in self.spectrum[:LISTED]]
        values["norms"] = [_digits(norm) for norm in self.norms]
        return {k: _digits(v) if isinstance(v, float) else v for k, v in values.items()}

    def line(self) -> str:
        """The statistics in one line."""
        low, mean, high = self.norms
        length = f"{mean:.3g}" if high - low < 1e-3 * mean else f"{low:.3g} to {high:.3g}"
        dead = (
            f", {counted(self.dead_dimensions, 'dead dimension')}" if self.dead_dimensions else ""
        )
        return (
            f"{self.count} of {self.dim} dimensions, length {length}, mean cosine "
            f"{self.mean_cosine:.3f}, effective rank {self.effective_rank:.1f} of "
            f"{self.full_rank}, deviation {self.std_ratio:.2f} of 1/sqrt(d){dead}"
        )


def measure(vectors: Tensor) -> Geometry:
    """The geometry of (N, d) vectors, N at least 2, computed in float64 on the CPU."""
    x = vectors.detach().to("cpu", torch.float64)
    n, d = x.shape
    lengths = x.norm(dim=1)  # N
    unit = F.normalize(x, dim=1)  # Nxd
    # Without the N products of a vector with itself.
    products = unit.sum(0).square().sum() - unit.square().sum()
    deviation = unit.std(0, correction=0) * math.sqrt(d)  # d
    singular = torch.linalg.svdvals(unit)  # min(N, d), falling
    top = singular[0].clamp_min(torch.finfo(torch.float64).tiny)
    return Geometry(
        count=n,
        dim=d,
        norms=(lengths.min().item(), lengths.mean().item(), lengths.max().item()),
        mean_cosine=products.item() / (n * (n - 1)),
        effective_rank=effective_rank(singular),
        std_ratio=deviation.mean().item(),
        dead_dimensions=int((deviation < 0.01).sum()),
        spectrum=tuple((singular / top).tolist()),
    )


def judge(geometry: Geometry, what: str) -> tuple[str, str]:
    """Return ``healthy``, ``bunched``, ``few dimensions`` or ``collapsed``, and an explanation.

    Args:
        what: name of the vectors, such as "keys". They should be projections, not features after a
            ReLU, which all lie in one orthant.
    """
    cosine, rank = geometry.mean_cosine, geometry.effective_rank
    if cosine > ALIKE:
        return "collapsed", (
            f"the {what} are all alike (mean cosine {cosine:.3f}; 0 is healthy, 1 is one point): "
            f"the encoder has collapsed, or has not yet left its initial state."
        )
    if rank < max(2.0, FEW * geometry.full_rank):
        return "few dimensions", (
            f"the {what} differ, but lie in few dimensions (effective rank {rank:.1f} of "
            f"{geometry.full_rank}): most of the {geometry.dim} dimensions are redundant."
        )
    if cosine > BUNCHED:
        return "bunched", (
            f"the {what} lie in one region of the sphere (mean cosine {cosine:.2f}; 0 is healthy): "
            f"the run is at its beginning, or its learning rate is unsuitable."
        )
    return "healthy", (
        f"the {what} are spread over the sphere (mean cosine {cosine:.2f}, near 0) and use many "
        f"directions (effective rank {rank:.0f} of {geometry.full_rank})."
    )


def _digits(value: float) -> float:
    return float(f"{value:.5g}")

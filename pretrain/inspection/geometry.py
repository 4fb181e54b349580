"""How vectors lie on the sphere: the signs of a representation that has collapsed, or has not.

Two kinds of collapse are told apart: all vectors alike (Chen & He 2021, "Exploring Simple Siamese
Representation Learning", section 4.1, measure it by the standard deviation of each dimension), and
all vectors within a few dimensions (Jing et al. 2022, "Understanding Dimensional Collapse in
Contrastive Self-supervised Learning"), which the effective rank shows (Roy & Vetterli 2007, "The
Effective Rank: A Measure of Effective Dimensionality").
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_common.text import counted

ALIKE = 0.98  # mean cosine from which on vectors count as one
BUNCHED = 0.5  # and as gathered in one region
FEW = 0.1  # share of the dimensions that vectors in few of them span
LISTED = 256  # singular values kept for the picture


@dataclass(frozen=True)
class Geometry:
    """N vectors of d numbers.

    Attributes:
        norms: smallest, mean and largest length, before all are scaled to 1.
        mean_cosine: over all pairs of two different vectors: 0 for a sphere filled evenly, 1 where
            all are alike.
        effective_rank: exp of the entropy of the singular values, each over their sum, the mean
            not removed: from 1 to min(N, d).
        std_ratio: standard deviation of a dimension times sqrt(d), a mean over the dimensions: 1
            for a sphere filled evenly, 0 where all are alike.
        dead_dimensions: those whose standard deviation is below a hundredth of 1/sqrt(d).
        spectrum: singular values over the largest one, falling.
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
        """What the effective rank can be at most."""
        return min(self.count, self.dim)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: figures of five digits, the first `LISTED` singular values."""
        values = asdict(self)
        values["spectrum"] = [round(s, 6) for s in self.spectrum[:LISTED]]
        values["norms"] = [_digits(norm) for norm in self.norms]
        return {k: _digits(v) if isinstance(v, float) else v for k, v in values.items()}

    def line(self) -> str:
        """The figures in one line."""
        low, mean, high = self.norms
        length = f"{mean:.3g}" if high - low < 1e-3 * mean else f"{low:.3g} to {high:.3g}"
        dead = (
            f", {counted(self.dead_dimensions, 'dead dimension')}" if self.dead_dimensions else ""
        )
        return (
            f"{self.count} of {self.dim} numbers, length {length}, mean cosine "
            f"{self.mean_cosine:.3f}, effective rank {self.effective_rank:.1f} of "
            f"{self.full_rank}, deviation {self.std_ratio:.2f} of 1/sqrt(d){dead}"
        )


def measure(vectors: Tensor) -> Geometry:
    """The geometry of (N, d) vectors, N at least 2, computed in float64 on the CPU."""
    x = vectors.detach().to("cpu", torch.float64)
    n, d = x.shape
    lengths = x.norm(dim=1)  # N
    unit = F.normalize(x, dim=1)  # Nxd
    # Of all N^2 products the N of a vector with itself are left out.
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


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of singular values, each over their sum; 0 where all are 0."""
    total = singular.sum()
    if total <= 0:
        return 0.0
    return float(torch.special.entr(singular / total).sum().exp())


def judge(geometry: Geometry, what: str) -> tuple[str, str]:
    """``healthy``, ``bunched``, ``few dimensions`` or ``collapsed``, and a sentence that says so.

    Args:
        what: the vectors are, such as "keys"; of projections, not of features behind a ReLU,
            which all lie in one corner of the space.
    """
    cosine, rank = geometry.mean_cosine, geometry.effective_rank
    if cosine > ALIKE:
        return "collapsed", (
            f"the {what} are all alike (mean cosine {cosine:.3f}; 0 is healthy, 1 is one point): "
            f"the encoder has collapsed, or has not yet left the state in which it started."
        )
    if rank < max(2.0, FEW * geometry.full_rank):
        return "few dimensions", (
            f"the {what} differ, but lie within few dimensions (effective rank {rank:.1f} of "
            f"{geometry.full_rank}): most of the {geometry.dim} numbers say what the others say."
        )
    if cosine > BUNCHED:
        return "bunched", (
            f"the {what} lie in one region of the sphere (mean cosine {cosine:.2f}; 0 is healthy): "
            f"the run is young, or its learning rate is off."
        )
    return "healthy", (
        f"the {what} are spread over the sphere (mean cosine {cosine:.2f}, near 0) and use many "
        f"directions (effective rank {rank:.0f} of {geometry.full_rank})."
    )


def _digits(value: float) -> float:
    return float(f"{value:.5g}")

"""The first convolution as a picture, and measures of weights that have gone wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco_common.backbone.resnet import growth_warning
from moco_common.text import counted
from pretrain.visualization.contact_sheet import enlarged, sheet

DEAD = 0.01  # fraction of the median norm below which a filter is dead
GROWTH_REMEDY = (
    "lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS, or rescale them with tools/convert.py "
    "--rescale."
)
NOISE = 0.8  # roughness above which filters look like their initial values
INITIAL_NORM = math.sqrt(6)  # initial norm of conv1 at any width, see `growth`
_SIDE = 84  # side of a drawn filter in pixels: 7 x 7 weights of 12 x 12 pixels


@dataclass(frozen=True)
class Filters:
    """The first convolution of one encoder.

    Attributes:
        count: number of filters.
        norm: norm of all weights together; initially `INITIAL_NORM`.
        norms: smallest, median and largest norm of a filter.
        dead: number of filters whose norm is below a hundredth of the median.
        roughness: mean square difference of neighbouring weights over twice their mean square,
            averaged over the filters: 1 for white noise (the initial values), 0 for a flat filter.
    """

    count: int
    norm: float
    norms: tuple[float, float, float]
    dead: int
    roughness: float

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)

    def line(self) -> str:
        """Format the figures in one line."""
        low, middle, high = self.norms
        return (
            f"{counted(self.count, 'filter')}, norm {self.norm:.3g} (initially "
            f"{INITIAL_NORM:.2f}), each {low:.2g} to {high:.2g} (median {middle:.2g}), "
            f"{self.dead} dead, roughness {self.roughness:.2f} (1: noise)"
        )

    def findings(self) -> list[str]:
        """Return conclusions from the figures, one sentence each; often none."""
        said = []
        factor = self.norm / INITIAL_NORM
        if grown := growth_warning("the first convolution", factor, GROWTH_REMEDY):
            said.append(grown)
        if self.dead:
            said.append(
                f"{self.dead} of {self.count} filters of the first convolution are dead (below a "
                f"hundredth of the median norm), which wastes width."
            )
        if self.roughness > NOISE:
            said.append(
                f"the filters of the first convolution are still noise, as initialised (roughness "
                f"{self.roughness:.2f} of 1): a short run hardly changes them, a long one should."
            )
        return said


def measure_filters(weight: Tensor) -> Filters:
    """Measure the (C, 3, h, w) weights of a convolution."""
    w = weight.detach().to("cpu", torch.float64)
    norms = w.flatten(1).norm(dim=1)  # C
    squares = [w.diff(dim=d).square().mean((1, 2, 3)) for d in (2, 3)]  # C, C
    energy = w.square().mean((1, 2, 3)).clamp_min(torch.finfo(w.dtype).tiny)  # C
    alive = norms > DEAD * norms.median()
    rough = ((squares[0] + squares[1]) / 2 / (2 * energy))[alive]
    return Filters(
        count=len(w),
        norm=w.norm().item(),
        norms=(norms.min().item(), norms.median().item(), norms.max().item()),
        dead=int((~alive).sum()),
        roughness=rough.mean().item() if len(rough) else 0.0,
    )


def growth(state: Mapping[str, Tensor], prefix: str = "encoder_q.") -> tuple[str, float]:
    """Return the convolution whose norm has grown the most since the start, and the factor.

    A filter bank (O, I, k, k) is initialised with variance 2 / (O k^2) (He et al. 2015, fan-out),
    hence with norm sqrt(2 I): sqrt(6) for the three input channels of conv1, whatever its width.
    """
    grown = {
        name.removeprefix(prefix): tensor.float().norm().item() / math.sqrt(2 * tensor.shape[1])
        for name, tensor in state.items()
        if name.startswith(prefix) and tensor.dim() == 4
    }
    return max(grown.items(), key=lambda item: item[1])


def draw_filters(banks: Mapping[str, Tensor]) -> np.ndarray:
    """Draw filters as coloured squares, one block per encoder, the blocks below each other.

    Each filter is scaled by its largest weight, with grey for 0; dead filters are grey.

    Args:
        banks: (C, 3, h, w) weights by encoder; a filter has the same place in each block.

    Returns:
        uint8 (H, W, 3) RGB.
    """
    columns = math.ceil(math.sqrt(2 * max(map(len, banks.values()))))
    rows: list[list[np.ndarray]] = []
    for weight in banks.values():
        w = weight.detach().float().cpu()
        largest = w.abs().amax((1, 2, 3), keepdim=True)
        norms = w.flatten(1).norm(dim=1)
        largest[norms <= DEAD * norms.median()] = torch.inf
        pixels = ((w / largest + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        cells = [enlarged(square, _SIDE) for square in pixels]
        if rows:
            rows.append([np.full_like(cells[0], 255)])
        rows += [cells[i : i + columns] for i in range(0, len(cells), columns)]
    return sheet(rows)

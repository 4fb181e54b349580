"""The first convolution as a picture, and the numbers that tell weights that went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco_common.text import counted
from pretrain.visualization.contact_sheet import enlarged, sheet

DEAD = 0.01  # of the median norm: such a filter adds nothing
GROWN = 10.0  # times the norm at the start
GROWTH_MATTERS = (
    "BN hides it from the loss, and fine-tuning hardly moves such weights; lower SOLVER.BASE_LR, "
    "raise SOLVER.WARMUP_ITERS, or divide it out again with tools/convert.py --rescale."
)
NOISE = 0.8  # roughness from which on filters look as they did at the start
INITIAL_NORM = math.sqrt(6)  # of conv1 at any width, see `growth`
_SIDE = 84  # pixels of a filter: 7 x 7, each weight 12 x 12


@dataclass(frozen=True)
class Filters:
    """The first convolution of one encoder.

    Attributes:
        count: filters.
        norm: of all weights together; `INITIAL_NORM` at the start.
        norms: smallest, median and largest norm of a filter.
        dead: filters whose norm is below a hundredth of the median.
        roughness: mean over the filters of the mean square difference of neighbouring weights over
            twice their mean square: 1 for white noise (as at the start), 0 for a flat filter.
    """

    count: int
    norm: float
    norms: tuple[float, float, float]
    dead: int
    roughness: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def line(self) -> str:
        """The figures in one line."""
        low, middle, high = self.norms
        return (
            f"{counted(self.count, 'filter')}, norm {self.norm:.3g} ({INITIAL_NORM:.2f} at the "
            f"start), each {low:.2g} to {high:.2g} (median {middle:.2g}), {self.dead} dead, "
            f"roughness {self.roughness:.2f} (1: noise)"
        )

    def findings(self) -> list[str]:
        """What is to be said of them, one sentence each; often nothing."""
        said = []
        if self.norm > GROWN * INITIAL_NORM:
            said.append(
                f"the first convolution has grown to a norm of {self.norm:.0f} from "
                f"{INITIAL_NORM:.2f}: {GROWTH_MATTERS}"
            )
        if self.dead:
            said.append(
                f"{self.dead} of {self.count} filters of the first convolution are dead (below a "
                f"hundredth of the median norm): the rest does their work, and width is wasted."
            )
        if self.roughness > NOISE:
            said.append(
                f"the filters of the first convolution are still the noise of the start (roughness "
                f"{self.roughness:.2f} of 1): a short run hardly changes them, a long one should."
            )
        return said


def measure_filters(weight: Tensor) -> Filters:
    """Figures of a convolution's (C, 3, h, w) weights."""
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
    """The convolution whose norm has grown most since the start, and by what factor.

    A filter bank (O, I, k, k) starts with variance 2 / (O k^2) (He et al. 2015, fan-out), so with
    a norm of sqrt(2 I): sqrt(6) for the three channels of the first one, whatever its width.
    """
    grown = {
        name.removeprefix(prefix): tensor.float().norm().item() / math.sqrt(2 * tensor.shape[1])
        for name, tensor in state.items()
        if name.startswith(prefix) and tensor.dim() == 4
    }
    return max(grown.items(), key=lambda item: item[1])


def draw_filters(banks: Mapping[str, Tensor]) -> np.ndarray:
    """Filters as coloured squares, those of each encoder in one block, one below the other.

    Each filter is scaled to its own largest weight, with grey for 0; dead ones stay grey.

    Args:
        banks: (C, 3, h, w) weights by encoder, the same filters at the same places.

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

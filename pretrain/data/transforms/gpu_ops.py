"""Second half of a view, on the device: colour, blur and solarisation of whole batches.

The CPU then only decodes, crops and resizes. Each view has its own parameters: an operation is
applied to all views at once, with one row of coefficients per view, or to a subset whose indices
the CPU computes. Nothing is read back from the device, and nothing waits for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from moco_common.comm import to_device
from pretrain.data.transforms.cpu_ops import LUMA, blur_kernel
from pretrain.data.transforms.recipes import ViewParameters

OPERATIONS = ("", "brightness", "contrast", "saturation", "hue", "grayscale")  # "": no operation


@dataclass(frozen=True)
class PendingViews:
    """The pending operations of a batch of N views, with at most S colour operations each.

    Holds NumPy arrays, because worker processes would send each tensor through its own file.

    Attributes:
        kinds: int64 (N, S), indices into `OPERATIONS`, in order.
        factors: float32 (N, S), see `cpu_ops.apply_colour`.
        sigmas: float32 (N,), standard deviation of the blur; 0 for none.
        solarize: bool (N,), True for the views to solarise.
    """

    kinds: np.ndarray
    factors: np.ndarray
    sigmas: np.ndarray
    solarize: np.ndarray


def collect(parameters: Sequence[ViewParameters]) -> PendingViews:
    """Collect the parameters of N views in arrays."""
    slots = max((len(p.colour) for p in parameters), default=0)
    kinds = np.zeros((len(parameters), slots), np.int64)
    factors = np.ones((len(parameters), slots), np.float32)
    for i, p in enumerate(parameters):
        for slot, (name, factor) in enumerate(p.colour):
            kinds[i, slot] = OPERATIONS.index(name)
            factors[i, slot] = factor
    sigmas = np.array([p.sigma for p in parameters], np.float32)
    return PendingViews(kinds, factors, sigmas, np.array([p.solarize for p in parameters], bool))


def finish(views: torch.Tensor, pending: PendingViews) -> torch.Tensor:
    """Apply the pending operations; equal to `recipes.render` within one or two rounding steps.

    Args:
        views: uint8 (N, 3, H, W), RGB, on any device; not modified.

    Returns:
        uint8 (N, 3, H, W) in channels_last layout, on the same device.
    """
    x = views.to(torch.float32, memory_format=torch.contiguous_format)  # Nx3xHxW, 0 to 255
    for kinds, factors in zip(pending.kinds.T, pending.factors.T, strict=True):
        x = _blend(x, kinds, factors)
        turned = np.flatnonzero(kinds == OPERATIONS.index("hue"))
        if len(turned):
            rows = _on(x, turned)
            x.index_copy_(0, rows, _shift_hue(x[rows], _on(x, factors[turned])))
    blurred = np.flatnonzero(pending.sigmas)
    if len(blurred):
        rows = _on(x, blurred)
        x.index_copy_(0, rows, _blur(x[rows], pending.sigmas[blurred]))
    if pending.solarize.any():
        flags = _on(x, pending.solarize)[:, None, None, None]
        x = torch.where(flags, torch.minimum(x, 255 - x), x)
    return x.to(torch.uint8, memory_format=torch.channels_last)


def _on(x: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    """Move values to the device of x, and floating-point ones to its dtype."""
    tensor = torch.from_numpy(values)
    return to_device(tensor.to(x.dtype) if values.dtype.kind == "f" else tensor, x.device)


def _blend(x: torch.Tensor, kinds: np.ndarray, factors: np.ndarray) -> torch.Tensor:
    """Apply all but the hue: x -> a x + b luma(x) + c; for contrast, c contains the mean grey."""
    brightness, contrast, saturation, grey = (
        kinds == OPERATIONS.index(name)
        for name in ("brightness", "contrast", "saturation", "grayscale")
    )
    blends = brightness | contrast | saturation
    if not (blends | grey).any():
        return x
    luma = np.array(LUMA, np.float32)
    a = np.where(blends, factors, np.where(grey, 0, 1))
    b = np.where(saturation, 1 - factors, grey)
    matrix = a[:, None, None] * np.eye(3) + b[:, None, None] * luma  # Nx3x3
    # Pillow truncates where this rounds: subtract slightly less than half a step, so that whole
    # numbers stay as they are.
    c = _on(x, np.where(blends, np.float32(-0.499), 0))  # N
    if contrast.any():
        mean = (x.mean((2, 3)) @ _on(x, luma)).round()  # N
        c = c + mean * _on(x, np.where(contrast, 1 - factors, 0))
    y = torch.baddbmm(c[:, None, None], _on(x, matrix), x.flatten(2))  # Nx3xHW
    return y.view_as(x).clamp_(0, 255).round_()


def _shift_hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate the hue of x (N, 3, H, W), in [0, 255], by turns (N,), truncated to 1/255 turns."""
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)  # NxHxW
    divisor = chroma.clamp(min=1)  # values are whole: below 1, chroma and hue are 0
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + (6 * (turns * 255).trunc() / 255)[:, None, None]  # in sixths of a turn
    # Closed form of HSV to RGB: each channel is value - chroma * trapezium(hue).
    sixths = (
        hue[:, None] + torch.arange(5.0, 0.0, -2.0, device=x.device, dtype=x.dtype)[:, None, None]
    ).remainder(6)
    return (value[:, None] - chroma[:, None] * sixths.minimum(4 - sixths).clamp(0, 1)).round_()


def _blur(x: torch.Tensor, sigmas: np.ndarray) -> torch.Tensor:
    """Apply `cpu_ops.gaussian_blur` to each view of x (N, 3, H, W)."""
    n, channels, height, width = x.shape
    kernels = [blur_kernel(round(sigma, 2)) for sigma in sigmas.tolist()]
    radius = max(len(kernel) for kernel in kernels) // 2
    padded = np.stack([np.pad(kernel, radius - len(kernel) // 2) for kernel in kernels])  # NxT
    weight = _on(x, padded).repeat_interleave(channels, 0)[:, None, :, None]  # 3Nx1xTx1
    x = F.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1)[None]  # 1x3NxH'xW'
    x = F.conv2d(x, weight, groups=n * channels)
    x = F.conv2d(x, weight.transpose(2, 3), groups=n * channels)
    return x.view(n, channels, height, width).round_()

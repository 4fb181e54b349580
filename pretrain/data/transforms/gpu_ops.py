"""The second half of a view on the device: colour, blur and solarisation of whole batches.

The CPUs then only decode, crop and resize. Each view has parameters of its own, so an operation
is done to all views at once, with a row of coefficients each, or to those that take part, which
the CPU lists: nothing is asked back from the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pretrain.data.transforms.cpu_ops import LUMA, blur_kernel
from pretrain.data.transforms.recipes import ViewParameters

OPERATIONS = ("", "brightness", "contrast", "saturation", "hue", "grayscale")  # "": nothing


@dataclass(frozen=True)
class PendingViews:
    """What is left to do to a batch of N views, in at most S colour operations each.

    NumPy arrays, because worker processes would send each tensor through a file of its own.

    Attributes:
        kinds: int64 (N, S), indices into `OPERATIONS`, in order.
        factors: float32 (N, S), see `image_ops.apply_colour`.
        sigmas: float32 (N,), of the blur, 0 for none.
        solarize: bool (N,).
    """

    kinds: np.ndarray
    factors: np.ndarray
    sigmas: np.ndarray
    solarize: np.ndarray


def collect(parameters: Sequence[ViewParameters]) -> PendingViews:
    """The parameters of N views as arrays."""
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
    """Applies what is pending: the same as `views.render` within a rounding step or two.

    Args:
        views: uint8 (N, 3, H, W), RGB, on any device; not changed.

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
    """The values on the device of x, float ones in its type."""
    dtype = x.dtype if values.dtype.kind == "f" else None
    return torch.from_numpy(values).to(x.device, dtype, non_blocking=True)


def _blend(x: torch.Tensor, kinds: np.ndarray, factors: np.ndarray) -> torch.Tensor:
    """All but the hue: x -> a x + b luma(x) + c, where contrast's c holds the mean grey."""
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
    # Pillow truncates where this rounds: half a step less, but a little more for whole numbers.
    c = _on(x, np.where(blends, np.float32(-0.499), 0))  # N
    if contrast.any():
        mean = (x.mean((2, 3)) @ _on(x, luma)).round()  # N
        c = c + mean * _on(x, np.where(contrast, 1 - factors, 0))
    y = torch.baddbmm(c[:, None, None], _on(x, matrix), x.flatten(2))  # Nx3xHW
    return y.view_as(x).clamp_(0, 255).round_()


def _shift_hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turns the hue of HSV, x (N, 3, H, W) in 0 to 255 by turns (N,), in whole steps of 1 / 255."""
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)  # NxHxW
    divisor = chroma.clamp(min=1)  # values are whole: a chroma below 1 is 0, and so is its hue
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + (6 * (turns * 255).trunc() / 255)[:, None, None]  # in sixths of the wheel
    # The closed form of HSV to RGB: each channel is value - chroma * trapezium(hue).
    sixths = (hue[:, None] + x.new_tensor([5.0, 3.0, 1.0])[:, None, None]).remainder(6)
    return (value[:, None] - chroma[:, None] * sixths.minimum(4 - sixths).clamp(0, 1)).round_()


def _blur(x: torch.Tensor, sigmas: np.ndarray) -> torch.Tensor:
    """`image_ops.gaussian_blur` of each of x (N, 3, H, W)."""
    n, channels, height, width = x.shape
    kernels = [blur_kernel(round(sigma, 2)) for sigma in sigmas.tolist()]
    radius = max(len(kernel) for kernel in kernels) // 2
    padded = np.stack([np.pad(kernel, radius - len(kernel) // 2) for kernel in kernels])  # NxT
    weight = _on(x, padded).repeat_interleave(channels, 0)[:, None, :, None]  # 3Nx1xTx1
    x = F.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1)[None]  # 1x3NxH'xW'
    x = F.conv2d(x, weight, groups=n * channels)
    x = F.conv2d(x, weight.transpose(2, 3), groups=n * channels)
    return x.view(n, channels, height, width).round_()

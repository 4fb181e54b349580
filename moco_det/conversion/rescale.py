"""Reversal of the growth of weights in pre-training, without changing the network's function.

A batch norm divides by the standard deviation of its input, so scaling the convolution before it
by a factor changes neither output nor loss. It does change the effective learning rate, by
1 / factor**2 (van Laarhoven 2017, "L2 regularization versus batch and weight normalization"): a
layer whose weights grew tenfold in pre-training is fine-tuned as if at a hundredth of the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from moco_common.backbone.architecture import Architecture
from moco_common.backbone.resnet import growth_warning


def factors(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, float]:
    """Return the ratio of each convolution's norm to that of a freshly initialised one, by name.

    Fresh weights have variance 2 / (out * kernel^2) (He et al. 2015, fan-out, as in Detectron2) and
    thus norm sqrt(2 * in), where "in" counts the input channels of a group.

    Args:
        tensors: the backbone's tensors by torchvision name.
        architecture: the network.

    Returns:
        One factor per layer; 1 if its weights are all zero or not finite.
    """
    result = {}
    for layer in architecture.layers():
        norm = tensors[f"{layer.conv}.weight"].double().norm().item()
        sound = norm > 0 and math.isfinite(norm)
        result[layer.conv] = norm / math.sqrt(2 * layer.shape[1]) if sound else 1.0
    return result


def divide(
    tensors: Mapping[str, Tensor], architecture: Architecture, by: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the same network with each convolution divided by its factor.

    The running mean is divided by it too, and the running variance by its square; the norm's weight
    and bias are unchanged. What remains is the effect of the norms' eps, which grows by factor**2;
    the converter's proof measures it.

    Returns:
        All tensors, of which the changed ones are new.
    """
    divisors = {f"{layer.conv}.weight": by[layer.conv] for layer in architecture.layers()}
    divisors |= running_factors(architecture, by)
    return {name: t / divisors[name] if name in divisors else t for name, t in tensors.items()}


def running_factors(architecture: Architecture, by: Mapping[str, float]) -> dict[str, float]:
    """Return the divisor that `divide` applies to each running statistic, by its name."""
    return {
        f"{layer.norm}.{leaf}": by[layer.conv] ** power
        for layer in architecture.layers()
        for leaf, power in (("running_mean", 1), ("running_var", 2))
    }


def growth_note(by: Mapping[str, float], divided: bool) -> str | None:
    """Return a note on the factors; None if they are small."""
    name, largest = max(by.items(), key=lambda item: item[1])
    if divided:
        return (
            f"each convolution was given the norm of a fresh one; {name} had grown most, to "
            f"{largest:.1f} times that norm"
        )
    return growth_warning(name, largest, "--rescale divides the factor out and keeps the output")

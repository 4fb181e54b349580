"""Divide out what the weights have grown by in pre-training, without a change of the function.

A batch norm divides by the standard deviation of what it gets, so the factor of the convolution
before it does not show: not in the output, nor in the loss. It does in the gradient, which falls as
the weights grow: by a step of the same learning rate their direction turns 1 / factor**2 as far
(van Laarhoven 2017, "L2 regularization versus batch and weight normalization"). A layer that
pre-training has grown tenfold learns in fine-tuning as if its learning rate were a hundredth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from moco_common.resnet import growth_warning
from moco_det.conversion.architecture import Architecture


def factors(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, float]:
    """By the convolution's name: norm of its weights over the norm that a fresh layer has.

    Fresh weights have the variance 2 / (out * kernel^2) (He et al. 2015, fan-out; Detectron2's
    networks start so too), and the norm sqrt(2 * in), of a group's channels.

    Args:
        tensors: of the backbone, by torchvision name.

    Returns:
        One factor a layer; 1 for a layer of zeros or of values that are not finite.
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
    """The same network with every convolution divided by its factor.

    The running mean is divided by it as well, and the running variance by its square; the norm's
    weight and bias stay. What differs is the eps of the norms, which weighs factor**2 as much as
    it did: the converter's proof measures what that is.

    Returns:
        All tensors; those that change are new.
    """
    divisors = {f"{layer.conv}.weight": by[layer.conv] for layer in architecture.layers()}
    divisors |= running_factors(architecture, by)
    return {name: t / divisors[name] if name in divisors else t for name, t in tensors.items()}


def running_factors(architecture: Architecture, by: Mapping[str, float]) -> dict[str, float]:
    """By the name of a running statistic, what `divide` has divided it by."""
    return {
        f"{layer.norm}.{leaf}": by[layer.conv] ** power
        for layer in architecture.layers()
        for leaf, power in (("running_mean", 1), ("running_var", 2))
    }


def sentence(by: Mapping[str, float], divided: bool) -> str | None:
    """What is to be said of the factors; nothing if they are small."""
    name, largest = max(by.items(), key=lambda item: item[1])
    if divided:
        return (
            f"every convolution was given the norm of a fresh one; {name} had the largest, "
            f"{largest:.1f} times that"
        )
    return growth_warning(name, largest, "--rescale divides it out and leaves the output the same")

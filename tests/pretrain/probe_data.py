"""Tiny class folders, and tiny networks that see them."""

import cv2
import numpy as np
import torch

from pretrain.modeling.resnet import ResNet

COLOURS = {"amber": (30, 160, 220), "blue": (220, 60, 20), "green": (40, 190, 60)}  # BGR


def write_classes(folder, per_class, seed=0, size=(40, 48), colours=COLOURS):
    """Noise over a colour a class: ``folder/CLASS/00.jpg`` ..."""
    rng = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            noise = rng.normal(0, 30, (*size, 3))
            image = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / name / f"{i:02d}.jpg"), image)
    return folder


def tiny_backbone(depth=18, seed=0, **arguments):
    torch.manual_seed(seed)
    arguments.setdefault("width", 1 / 16)
    return ResNet(depth, **arguments).requires_grad_(False).eval()


def separable(n, classes, dim=8, seed=0):
    """Features around far corners: a linear classifier can be right always."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = 3 * torch.eye(dim)[:classes]
    return centres[labels] + 0.2 * torch.randn(n, dim, generator=generator), labels

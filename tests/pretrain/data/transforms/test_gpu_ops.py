"""Views finished on the device: against Pillow's and the CPU path's, with the same parameters."""

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data.transforms import gpu_ops as device_views
from pretrain.data.transforms.gpu_ops import collect, finish
from pretrain.data.transforms.recipes import ViewParameters, draw, render, view_recipes
from tests.pretrain.data.transforms.test_cpu_ops import (
    PHOTOGRAPHS,
    SMALL,
    TOLERANCE,
    difference,
    pillow_view,
)

WHOLE = (0, 0, 224, 224)


def finished(images, parameters):
    """The device path for views of the whole of 224-pixel images: uint8 arrays (H, W, 3)."""
    views = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    before = views.clone()
    result = finish(views, collect(parameters))
    assert torch.equal(views, before)
    assert result.dtype == torch.uint8
    assert result.is_contiguous(memory_format=torch.channels_last)
    return result.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("operation", "tolerance"),
    [
        *[(("brightness", factor), 0.1) for factor in (0.0, 0.6, 1.0, 1.4)],
        *[(("contrast", factor), 0.5) for factor in (0.0, 0.6, 1.0, 1.4)],
        *[(("saturation", factor), 0.6) for factor in (0.0, 0.6, 1.0, 1.4)],
        *[(("hue", turns), TOLERANCE) for turns in (-0.5, -0.1, 0.0, 0.003, 0.25, 0.5)],
        (("grayscale", 1.0), 0.1),
    ],
)
def test_a_colour_operation_is_pillows(operation, tolerance):
    parameters = [ViewParameters(WHOLE, 224, (operation,))] * 2
    for ours, image in zip(finished(SMALL[:2], parameters), SMALL, strict=False):
        theirs = pillow_view(Image.fromarray(image), parameters[0])
        assert difference(ours, theirs) < tolerance


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.4, 2.0])
def test_blur_is_pillows(sigma):
    parameters = [ViewParameters(WHOLE, 224, sigma=sigma)]
    theirs = pillow_view(Image.fromarray(SMALL[0]), parameters[0])
    assert difference(finished(SMALL[:1], parameters)[0], theirs) < 1


@pytest.mark.parametrize("paper", ["moco-v1", "moco-v2", "simclr", "byol"])
def test_whole_views_in_one_batch_are_pillows_and_those_of_the_cpu(paper):
    recipe = view_recipes(paper)[1]
    rng = np.random.default_rng(1)
    drawn = [draw(recipe, 375, 500, rng.random) for _ in range(12)]
    images = [PHOTOGRAPHS[i % 4] for i in range(12)]
    halves = [render(x, p.geometry) for x, p in zip(images, drawn, strict=True)]
    for ours, image, parameters in zip(finished(halves, drawn), images, drawn, strict=True):
        theirs = pillow_view(Image.fromarray(image), parameters)
        assert difference(ours, theirs) < TOLERANCE, parameters
        assert difference(ours, render(image, parameters)) < TOLERANCE, parameters


def test_each_view_gets_its_own_parameters_whatever_its_neighbours():
    recipe = view_recipes("byol")[1]
    rng = np.random.default_rng(2)
    drawn = [draw(recipe, 224, 224, rng.random) for _ in range(6)]
    images = [SMALL[i % 4] for i in range(6)]
    together = finished(images, drawn)
    for i in range(6):
        alone = finished(images[i : i + 1], drawn[i : i + 1])[0]
        assert np.abs(alone.astype(int) - together[i]).max() <= 1


def test_nothing_pending_leaves_the_views_alone():
    plain = [ViewParameters(WHOLE, 224)] * 3
    assert (finished(SMALL[:3], plain) == np.stack(SMALL[:3])).all()


def test_clipping_between_operations_is_kept():
    bright = np.full((224, 224, 3), 220, np.uint8)
    twice = ViewParameters(WHOLE, 224, (("brightness", 1.4), ("brightness", 0.6)))
    assert np.abs(finished([bright], [twice])[0].astype(int) - 153).max() <= 1


def test_every_operation_that_is_drawn_is_known():
    recipes = [r for paper in ("moco-v1", "byol") for r in view_recipes(paper)]
    rng = np.random.default_rng(3)
    names = {n for r in recipes for _ in range(50) for n, _ in draw(r, 9, 9, rng.random).colour}
    assert names == set(device_views.OPERATIONS) - {""}

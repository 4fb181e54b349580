"""The distributions of what is drawn, against torchvision's own drawing."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from pretrain.views import ViewRecipe, draw, recipe

DRAWS = 3000


def kolmogorov_smirnov(a, b) -> float:
    """The largest distance of two samples' distribution functions, over its 0.1 % bound."""
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate((a, b))
    distance = np.searchsorted(a, points, "right") / len(a)
    distance -= np.searchsorted(b, points, "right") / len(b)
    return np.abs(distance).max() / (1.95 * math.sqrt(1 / len(a) + 1 / len(b)))


@pytest.mark.parametrize("size", [(375, 500), (300, 90), (40, 1000), (1000, 30), (1, 1), (2, 3)])
def test_boxes_are_distributed_as_in_random_resized_crop(size):
    height, width = size
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    crop = transforms.RandomResizedCrop(224, scale=(0.2, 1.0))
    theirs = np.array([crop.get_params(image, crop.scale, crop.ratio) for _ in range(DRAWS)])
    ours = np.array([draw(recipe("moco-v2"), height, width, rng).box for _ in range(DRAWS)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for axis, name in enumerate(("top", "left", "height", "width")):
        assert kolmogorov_smirnov(ours[:, axis], theirs[:, axis]) < 1, name
    areas, ratios = zip(
        *((o[:, 2] * o[:, 3], o[:, 3] / o[:, 2]) for o in (ours, theirs)), strict=True
    )
    assert kolmogorov_smirnov(*areas) < 1
    assert kolmogorov_smirnov(*ratios) < 1


@pytest.mark.parametrize("hue", [0.1, 0.4])
def test_jitter_is_distributed_as_in_color_jitter(hue):
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, hue)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    version = ViewRecipe(
        brightness=0.4, contrast=0.4, saturation=0.4, hue=hue, jitter_probability=1.0
    )
    theirs = [jitter.get_params(*ranges) for _ in range(DRAWS)]
    ours = [draw(version, 10, 10, rng).colour for _ in range(DRAWS)]
    names = ["brightness", "contrast", "saturation", "hue"]
    for i, name in enumerate(names):
        assert kolmogorov_smirnov([dict(o)[name] for o in ours], [t[i + 1] for t in theirs]) < 1
    orders = [tuple(names.index(name) for name, _ in colour) for colour in ours]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24  # every order, and each about as often
    assert ((counts - DRAWS / 24) ** 2 / (DRAWS / 24)).sum() < 49.7  # chi-square, 23 d.o.f., 0.1 %


def test_a_strength_above_one_cannot_make_a_factor_negative():
    version = ViewRecipe(brightness=1.5, jitter_probability=1.0)
    rng = np.random.default_rng(0)
    factors = [dict(draw(version, 9, 9, rng).colour)["brightness"] for _ in range(500)]
    assert min(factors) >= 0
    assert max(factors) > 2.4


@pytest.mark.parametrize(
    ("version", "jitter", "blur"), [("moco-v1", 1.0, 0.0), ("moco-v2", 0.8, 0.5)]
)
def test_a_recipe_has_its_papers_probabilities(version, jitter, blur):
    rng = np.random.default_rng(3)
    views = [draw(recipe(version), 375, 500, rng) for _ in range(DRAWS)]
    grey = [any(name == "grayscale" for name, _ in view.colour) for view in views]
    shares = {
        "jitter": (jitter, [len(view.colour) >= 4 for view in views]),
        "grey": (0.2, grey),
        "blur": (blur, [view.sigma > 0 for view in views]),
        "flip": (0.5, [view.flip for view in views]),
    }
    for name, (expected, seen) in shares.items():
        assert abs(np.mean(seen) - expected) <= 3.3 * math.sqrt(0.25 / DRAWS), name
    sigmas = [view.sigma for view in views if view.sigma]
    if blur:
        uniform = np.linspace(0.1, 2, 2000)
        assert kolmogorov_smirnov(sigmas, uniform) < 1
        assert min(sigmas) >= 0.1


@pytest.mark.parametrize(("version", "place"), [("moco-v1", 0), ("moco-v2", -1)])
def test_v1_greys_before_the_jitter_and_v2_after_it(version, place):
    rng = np.random.default_rng(4)
    for _ in range(300):
        names = [name for name, _ in draw(recipe(version), 9, 9, rng).colour]
        if "grayscale" in names:
            assert names[place] == "grayscale"


def test_the_same_generator_state_draws_the_same():
    a, b = (draw(recipe("moco-v2"), 50, 60, np.random.default_rng(5)) for _ in range(2))
    assert a == b


def test_an_unknown_recipe_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="moco-v1, moco-v2"):
        recipe("moco-v9")

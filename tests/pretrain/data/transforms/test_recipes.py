"""The distributions of what is drawn, against torchvision's own drawing."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from moco_common.errors import UserError
from pretrain.data.transforms.recipes import ViewRecipe, draw, view_recipes

DRAWS = 3000
MOCO_V2 = view_recipes("moco-v2")[0]


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
    ours = np.array([draw(MOCO_V2, height, width, rng.random).box for _ in range(DRAWS)])
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
    ours = [draw(version, 10, 10, rng.random).colour for _ in range(DRAWS)]
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
    factors = [dict(draw(version, 9, 9, rng.random).colour)["brightness"] for _ in range(500)]
    assert min(factors) >= 0
    assert max(factors) > 2.4


# Of each paper: strengths, then probabilities of jitter, blur and solarisation, of both views.
PAPERS = {
    "moco-v1": ((0.4, 0.4, 0.4, 0.4), 1.0, (0.0, 0.0), (0.0, 0.0)),
    "moco-v2": ((0.4, 0.4, 0.4, 0.1), 0.8, (0.5, 0.5), (0.0, 0.0)),
    "simclr": ((0.8, 0.8, 0.8, 0.2), 0.8, (0.5, 0.5), (0.0, 0.0)),
    "byol": ((0.4, 0.4, 0.2, 0.1), 0.8, (1.0, 0.1), (0.0, 0.2)),
    "swav": ((0.8, 0.8, 0.8, 0.2), 0.8, (0.5, 0.5), (0.0, 0.0)),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_views_have_their_papers_strengths_and_probabilities(paper):
    strengths, jitter, blurs, solarizations = PAPERS[paper]
    rng = np.random.default_rng(3)
    for version, blur, solarize in zip(view_recipes(paper), blurs, solarizations, strict=True):
        views = [draw(version, 375, 500, rng.random) for _ in range(DRAWS)]
        names = [[name for name, _ in view.colour] for view in views]
        shares = {
            "jitter": (jitter, ["hue" in drawn for drawn in names]),
            "grey": (0.2, ["grayscale" in drawn for drawn in names]),
            "blur": (blur, [view.sigma > 0 for view in views]),
            "solarize": (solarize, [view.solarize for view in views]),
            "flip": (0.5, [view.flip for view in views]),
        }
        for name, (expected, seen) in shares.items():
            error = 3.3 * math.sqrt(expected * (1 - expected) / DRAWS)
            assert abs(np.mean(seen) - expected) <= error, name
        sigmas = [view.sigma for view in views if view.sigma]
        if blur:
            assert kolmogorov_smirnov(sigmas, np.linspace(0.1, 2, 2000)) < 1
        operations = [operation for view in views for operation in view.colour]
        for (name, centre), x in zip(
            {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}.items(),
            strengths,
            strict=True,
        ):
            drawn = [factor for operation, factor in operations if operation == name]
            assert kolmogorov_smirnov(drawn, centre + np.linspace(-x, x, 2000)) < 1, name


def test_multi_crop_adds_small_views_of_areas_below_those_of_the_pair():
    recipes = view_recipes("swav", crop_size=160, small_crops=6, small_crop_size=64)
    assert [version.crop_size for version in recipes] == [160] * 2 + [64] * 6
    assert [version.scale for version in recipes] == [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6
    assert len({replace(r, crop_size=1, scale=(1, 1)) for r in recipes}) == 1
    plain = view_recipes("swav", min_scale=0.3)
    assert [version.scale for version in plain] == [(0.3, 1.0)] * 2


@pytest.mark.parametrize(("version", "place"), [("moco-v1", 0), ("moco-v2", -1)])
def test_v1_greys_before_the_jitter_and_v2_after_it(version, place):
    rng = np.random.default_rng(4)
    for _ in range(300):
        names = [name for name, _ in draw(view_recipes(version)[0], 9, 9, rng.random).colour]
        if "grayscale" in names:
            assert names[place] == "grayscale"


def test_the_same_generator_state_draws_the_same():
    a, b = (draw(MOCO_V2, 50, 60, np.random.default_rng(5).random) for _ in range(2))
    assert a == b


def test_an_unknown_recipe_is_an_error_that_lists_the_known():
    with pytest.raises(UserError, match=r"AUGMENTATION 'moco-v9'.*moco-v1, moco-v2, simclr, byol"):
        view_recipes("moco-v9")

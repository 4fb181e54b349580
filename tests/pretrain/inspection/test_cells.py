"""Matched cells and slots of views, measured and drawn."""

import cv2
import numpy as np
import pytest
import torch

from pretrain.data.loader import build_batches
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import ViewRecipe
from pretrain.inspection.cells import draw_matches, draw_slots, match_views
from pretrain.methods.base import Method
from pretrain.methods.correspondence import cell_centres

GREEN, RED = (0, 158, 115), (213, 94, 0)
CELLS = 7


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(8):
        coarse = rng.integers(0, 60, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(coarse, (160, 120)))
    recipes = [ViewRecipe(crop_size=56, scale=(0.3, 0.6))] * 2
    (result,) = build_batches(open_source(str(folder)), recipes, batch_size=8, seed=1, stop_step=1)
    return result


class Seeing(Method):
    """Matches every cell with the one whose centre is nearest; or any, drawn at random."""

    def __init__(self, places, at_random=False):
        super().__init__()
        self.places, self.at_random = places, at_random

    def match(self, views):
        centres = [cell_centres(places, CELLS, CELLS) for places in self.places]
        nearest = torch.cdist(*centres).argmin(2)
        if self.at_random:
            generator = torch.Generator().manual_seed(0)
            nearest = torch.randint(CELLS**2, nearest.shape, generator=generator)
        return nearest.view(-1, CELLS, CELLS)


def has(picture, colour):
    return bool((picture == colour).all(2).any())


def test_a_method_that_sees_where_cells_lie_is_right_everywhere(batch):
    matches = match_views(Seeing(batch.places), batch)
    assert matches.share == 1
    assert 0.005 < matches.chance < 0.1
    assert 0 < matches.shared.float().mean() < 1
    assert "100% of" in matches.line()
    picture = draw_matches(batch.views, matches)
    assert picture.shape == (8 * 228 - 4, 2 * 228 - 4, 3)
    assert has(picture, GREEN)
    assert not has(picture, RED)


def test_random_matches_are_right_by_chance(batch):
    matches = match_views(Seeing(batch.places, at_random=True), batch)
    n, expected = int(matches.shared.sum()), matches.chance
    assert abs(matches.share - expected) < 4 * (expected / n) ** 0.5
    assert has(draw_matches(batch.views, matches), RED)


def test_views_without_a_common_place_have_no_share(batch):
    places = batch.places.clone()
    batch.places[0, :, :4] = torch.tensor([0.0, 0.0, 0.2, 0.2])
    batch.places[1, :, :4] = torch.tensor([0.8, 0.8, 1.0, 1.0])
    matches = match_views(Seeing(batch.places), batch)
    assert (matches.share, matches.chance, matches.as_dict()["cells"]) == (0, 0, 0)
    batch.places.copy_(places)


def test_a_method_of_whole_images_matches_nothing(batch):
    assert match_views(Method(), batch) is None
    assert Method().slots(batch.views[0]) is None


def test_cells_of_one_slot_have_one_colour():
    view = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    picture = draw_slots(view, torch.tensor([[[5, 9], [9, 5]]]))
    tinted = picture[:, 228:]
    corners = [tinted[y, x].tolist() for y, x in ((9, 9), (9, 200), (200, 9), (200, 200))]
    assert corners[0] == corners[3] != corners[1] == corners[2]
    assert (picture[:224, :224] == 100).all()

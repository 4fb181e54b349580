"""Where a view lies in its image: pixels found again by it, on every way that a view is made."""

import io
import tarfile
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from pretrain.data.loader import build_batches
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import ViewRecipe, view_recipes
from pretrain.methods.correspondence import cell_centres

HEIGHT, WIDTH, IMAGES = 150, 220, 6
PLAIN = ViewRecipe(crop_size=40)
SMALL = ViewRecipe(crop_size=24, scale=(0.05, 0.14))


def photograph(number):
    """A generated scene: red grows to the right, green downwards; blue is a texture of its own."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rng = np.random.default_rng(number)
    blue = cv2.resize(rng.integers(0, 256, (15, 22), dtype=np.uint8), (WIDTH, HEIGHT))
    red, green = 255 * (x + 0.5) / WIDTH, 255 * (y + 0.5) / HEIGHT
    return np.stack([red, green, blue], 2).round().astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    result = tmp_path_factory.mktemp("scenes")
    for i in range(IMAGES):
        cv2.imwrite(str(result / f"{i}.png"), photograph(i)[:, :, ::-1])
    return result


@pytest.fixture(params=["folder", "shards"])
def source(request, folder, tmp_path):
    if request.param == "folder":
        return open_source(str(folder))
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for path in sorted(folder.iterdir())[3 * shard : 3 * shard + 3]:
                entry = tarfile.TarInfo(path.name)
                entry.size = path.stat().st_size
                tar.addfile(entry, io.BytesIO(path.read_bytes()))
    return open_source(f"shards:{tmp_path}/{{0..1}}.tar")


def batches(source, recipes, **options):
    settings = {"batch_size": 4, "seed": 5, "stop_step": 4} | options
    return list(build_batches(source, recipes, **settings))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_pixel_of_a_view_is_found_in_its_image(source, on_device, workers):
    recipes = [replace(r, on_device=on_device) for r in (PLAIN, PLAIN, SMALL, SMALL)]
    flips = []
    for batch in batches(source, recipes, num_workers=workers):
        assert batch.places.shape == (4, 4, 5)
        assert batch.places.dtype == torch.float32
        for recipe, views, places in zip(recipes, batch.to("cpu"), batch.places, strict=True):
            side = recipe.crop_size
            centres = cell_centres(places, side, side).view(4, side, side, 2)
            colours = views.permute(0, 2, 3, 1)[..., :2]
            inner = (slice(None), slice(2, -2), slice(2, -2))  # resizing smears at the edges
            assert (255 * centres - colours)[inner].abs().max() < 2
            flips += places[:, 4].tolist()
    assert {0.0, 1.0} == set(flips)


def test_two_views_of_a_photograph_agree_where_their_places_do(folder):
    """The texture, which the places know nothing of, is the same at the same place."""
    differences, far = [], []
    for batch in batches(open_source(str(folder)), (PLAIN, PLAIN)):
        blue = [view[:, 2].flatten(1).float() for view in batch.views]
        centres = [cell_centres(places, 40, 40) for places in batch.places]
        distance, match = torch.cdist(*centres).min(2)
        found = (blue[0] - blue[1].gather(1, match)).abs()
        differences.append(found[distance < 0.004])
        far.append((blue[0] - blue[1]).abs().flatten())
    assert len(torch.cat(differences)) > 1000
    assert torch.cat(differences).mean() < 0.1 * torch.cat(far).mean()


def test_places_are_the_same_when_a_run_resumes_and_for_every_rank(source):
    recipes = view_recipes("swav", crop_size=40, small_crops=2, small_crop_size=24)
    whole = [batch.places for batch in batches(source, recipes)]
    resumed = [batch.places for batch in batches(source, recipes, start_step=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], resumed, strict=True))
    if not source.streamed:  # ranks read shards of their own
        parts = [batches(source, recipes, rank=rank, world_size=2) for rank in range(2)]
        for step, places in enumerate(whole):
            shares = [part[step].places for part in parts]
            assert torch.equal(torch.cat(shares, 1), places)


def test_reduced_decoding_leaves_the_places_alone(tmp_path):
    large = cv2.resize(photograph(0), (1600, 1200))
    cv2.imwrite(str(tmp_path / "large.jpg"), large[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    (batch,) = batches(open_source(str(tmp_path)), (PLAIN,), stop_step=1)
    centres = cell_centres(batch.places[0], 40, 40).view(4, 40, 40, 2)
    colours = batch.views[0].permute(0, 2, 3, 1)[..., :2]
    assert (255 * centres - colours)[:, 2:-2, 2:-2].abs().max() < 5

import io

import numpy as np
import pytest
from PIL import Image

from pretrain.loader import build_batches
from pretrain.show_views import views_picture
from pretrain.sources import FileSource, open_source
from pretrain.views import view_recipes


@pytest.fixture
def source(tmp_path):
    for i, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        image = Image.new("RGB", (100, 50), colour)
        image.paste((0, 0, 0), (60, 30, 100, 50))  # so that it can be seen which way it lies
        image.save(tmp_path / f"{i}.png")
    return open_source(str(tmp_path))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("on_device", [False, True])
def test_the_picture_shows_the_runs_first_samples_and_their_views_pixel_by_pixel(source, on_device):
    recipes = view_recipes("byol", crop_size=192, on_device=on_device)
    picture = pixels(views_picture(source, recipes, 3, seed=5))
    assert picture.shape == (3 * 196 - 4, 3 * 196 - 4, 3)
    (batch,) = build_batches(source, recipes, batch_size=3, seed=5, stop_step=1)
    first, second = batch.to("cpu")
    for row, image in enumerate(batch.index.tolist()):
        cells = [picture[196 * row :][:192, 196 * column :][:, :192] for column in range(3)]
        original = np.asarray(Image.open(source.name(image)))
        assert (cells[0][48:100, :110] == original[0, 0]).all()
        assert (cells[0][110:144, 120:] == 0).all()
        assert (cells[0][:47] == 255).all()
        assert (cells[1] == first[row].permute(1, 2, 0).numpy()).all()
        assert (cells[2] == second[row].permute(1, 2, 0).numpy()).all()


def test_small_views_are_enlarged_by_whole_factors_without_new_colours(source):
    recipes = view_recipes("swav", crop_size=64, small_crops=1, small_crop_size=32)
    picture = pixels(views_picture(source, recipes, 1))
    assert picture.shape == (192, 4 * 196 - 4, 3)
    (batch,) = build_batches(source, recipes, batch_size=1, seed=0, stop_step=1)
    for column, factor in ((1, 3), (3, 6)):
        cell = picture[:192:factor, 196 * column :][:, :192:factor]
        assert (cell == batch.views[column - 1][0].permute(1, 2, 0).numpy()).all()


def test_streamed_images_are_shown_too(source):
    class Streamed(FileSource):
        streamed = True

        def stream(self, batches, batch_size, seed):
            read = super().read
            for positions in batches:
                yield [read(int(i)) for i in self.order(positions, batch_size, seed)]

        def read(self, index):
            raise TypeError

    stream = Streamed()
    stream.__dict__.update(source.__dict__)
    recipes = view_recipes("moco-v2", crop_size=160)
    assert views_picture(stream, recipes, 2) == views_picture(source, recipes, 2)

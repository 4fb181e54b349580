import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.config.defaults import load_config, recipe_names
from pretrain.data.loader import build_batches
from pretrain.data.sources import FileSource, open_source
from pretrain.data.transforms.recipes import build_recipes, view_recipes
from pretrain.visualization.contact_sheet import GAP, heading
from pretrain.visualization.views import views_picture
from tests.pretrain import tiny
from tools.pretrain import main

STRIP = 20  # pixels of the headings above the rows


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
    assert picture.shape == (STRIP + 3 * 196 - 4, 3 * 196 - 4, 3)
    picture = picture[STRIP:]
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
    assert picture.shape == (STRIP + 192, 4 * 196 - 4, 3)
    picture = picture[STRIP:]
    (batch,) = build_batches(source, recipes, batch_size=1, seed=0, stop_step=1)
    for column, factor in ((1, 3), (3, 6)):
        cell = picture[:192:factor, 196 * column :][:, :192:factor]
        assert (cell == batch.views[column - 1][0].permute(1, 2, 0).numpy()).all()


def inked(strip):
    """Columns of pixels with something dark in them."""
    return (strip < 128).any((0, 2)).nonzero()[0]


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("moco", ["query view, 48 px", "key view, 48 px"]),
        ("end-to-end", ["query view, 48 px", "key view, 48 px"]),
        ("memory-bank", ["query view, 48 px"]),
        ("simclr", ["view 1, 48 px", "view 2, 48 px"]),
        ("byol", ["view 1 (T), 48 px", "view 2 (T'), 48 px"]),
        ("swav", ["view 1, 48 px", "view 2, 48 px"]),
        ("dense-cl", ["query view, 48 px", "key view, 48 px"]),
        ("supervised", ["view, 48 px"]),
        ("slot-con", ["view 1 (T), 48 px", "view 2 (T'), 48 px"]),
        ("pixpro", ["view 1 (T), 48 px", "view 2 (T'), 48 px"]),
        ("", ["view 1, 48 px", "view 2, 48 px"]),
    ],
)
def test_each_column_has_the_name_that_its_method_gives_it(source, method, names):
    recipes = view_recipes("moco-v2", crop_size=48)
    picture = pixels(views_picture(source, recipes, 2, method=method))
    without_names = pixels(views_picture(source, recipes, 2))
    assert picture.shape[1] == (1 + len(names)) * 196 - GAP
    assert (picture[STRIP:] == without_names[STRIP:, : picture.shape[1]]).all()
    for column, name in enumerate(["photograph", *names]):
        strip = picture[:STRIP, 196 * column :][:, :192]
        assert (strip == heading(name, 192)[:, :192]).all()
        left, right = inked(strip)[[0, -1]]
        assert right - left > 4 * len(name)  # letters, none of them lost
        assert abs(left - (191 - right)) < 8  # in the middle


def test_crops_of_multi_crop_are_named_and_told_apart(source):
    recipes = view_recipes("swav", crop_size=160, small_crops=2, small_crop_size=96)
    picture = pixels(views_picture(source, recipes, 1, method="swav"))
    names = ["large crop 1, 160 px", "large crop 2, 160 px"]
    names += ["small crop 1, 96 px", "small crop 2, 96 px"]
    strips = [picture[:STRIP, 164 * (1 + i) :][:, :160] for i in range(4)]
    for strip, name in zip(strips, names, strict=True):
        assert (strip == heading(name, 160)[:, :160]).all()
    assert len({strip.tobytes() for strip in strips}) == 4


@pytest.mark.parametrize("side", [160, 192])
def test_a_heading_stays_in_its_column(side):
    strip = heading("large crop 1, 1024 px of an image", side)
    assert strip.shape == (STRIP, side + GAP, 3)
    assert side / 2 < inked(strip)[-1] < side


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_columns_are_the_views_that_the_method_looks_at(source, recipe):
    cfg = load_config(recipe)
    words = ["INPUT.SMALL_CROPS", cfg.INPUT.SMALL_CROPS, "INPUT.AUGMENTATION"]
    method, cfg = tiny.build(cfg.METHOD, *words, cfg.INPUT.AUGMENTATION, "INPUT.CROP_SIZE", 160)
    recipes = build_recipes(cfg)
    picture = pixels(views_picture(source, recipes, 1, method=cfg.METHOD))
    views = len(recipes[: method.num_views])
    assert picture.shape[1] == (1 + views) * 164 - GAP


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


@pytest.mark.parametrize("target", ["photos/a.png", "photos/sub/../a.png", "link", "list.txt"])
def test_views_replace_no_input(tmp_path, monkeypatch, capsys, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save("photos/a.png")
    Path("list.txt").write_text("photos/a.png\n")
    Path("link").symlink_to("list.txt")
    before = Path(target).read_bytes()
    words = "INPUT.CROP_SIZE 32 SOLVER.BATCH_SIZE 1".split()
    for data in (["photos", "list.txt"], ["list.txt"]):
        given = ["--config", "small-data", "--data", *data, "--output-dir", "run"]
        assert main([*given, "--show-views", target, *words]) == 1
        assert "is an input" in capsys.readouterr().err
    assert Path(target).read_bytes() == before

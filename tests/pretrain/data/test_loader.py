import io
import itertools
import multiprocessing
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_common.errors import UserError
from pretrain.data.decoding import decode
from pretrain.data.loader import build_batches, sample_numbers
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import draw, render, view_recipes

ROOT = Path(__file__).resolve().parents[3]
IMAGES = 13
RECIPES = (
    view_recipes("byol", crop_size=32)[1],
    view_recipes("moco-v1", crop_size=24)[0],
)


def write_images(folder, count=IMAGES):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((80, 60), Image.Resampling.BICUBIC).save(folder / f"{i:02}.jpg")
    return folder


@pytest.fixture
def source(tmp_path):
    return open_source(str(write_images(tmp_path / "images")))


def batches(source, stop_step, *, batch_size=8, seed=3, **options):
    return list(
        build_batches(
            source, RECIPES, batch_size=batch_size, seed=seed, stop_step=stop_step, **options
        )
    )


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index)
        assert a.skipped == b.skipped
        for x, y in zip(a.views, b.views, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 13, 32])
def test_an_epoch_shows_every_image_once_whatever_the_batch(source, batch_size):
    steps = -(-3 * IMAGES // batch_size)
    index = torch.cat([b.index for b in batches(source, steps, batch_size=batch_size)])
    for epoch in range(3):
        assert sorted(index[epoch * IMAGES : (epoch + 1) * IMAGES].tolist()) == list(range(IMAGES))


def test_a_batch_holds_what_its_parts_give(source):
    (batch,) = batches(source, 3, start_step=2)
    for j in range(8):
        image = decode(source.read(int(batch.index[j])))
        random = iter(sample_numbers(3, np.array(2 * 8 + j), 2)).__next__
        for version, views in zip(RECIPES, batch.views, strict=True):
            view = render(image, draw(version, *image.shape[:2], random))
            assert (views[j].permute(1, 2, 0).numpy() == view).all()


def test_views_are_uint8_in_channels_last_layout(source):
    (batch,) = batches(source, 1)
    assert [tuple(view.shape) for view in batch.views] == [(8, 3, 32, 32), (8, 3, 24, 24)]
    for view in batch.views:
        assert view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert batch.index.dtype == torch.int64


def test_views_finished_on_the_device_are_those_of_the_cpu(source):
    for paper in ("moco-v1", "byol"):
        here, there = (
            next(
                build_batches(
                    source,
                    view_recipes(paper, crop_size=64, on_device=on_device),
                    batch_size=12,
                    seed=3,
                    stop_step=1,
                    num_workers=int(on_device),
                )
            )
            for on_device in (False, True)
        )
        assert torch.equal(here.index, there.index)
        for ours, theirs in zip(there.to("cpu"), here.to("cpu"), strict=True):
            assert ours.is_contiguous(memory_format=torch.channels_last)
            assert (ours.float() - theirs.float()).abs().mean() < 2
        assert any(
            (raw.float() - view.float()).abs().mean() > 9
            for raw, view in zip(there.views, here.views, strict=True)
        )


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(source, num_workers):
    assert_equal(batches(source, 5, num_workers=num_workers), batches(source, 5))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one(source, world_size):
    ranks = [batches(source, 4, rank=r, world_size=world_size) for r in range(world_size)]
    for whole, *shares in zip(batches(source, 4), *ranks, strict=True):
        assert torch.equal(whole.index, torch.cat([share.index for share in shares]))
        for i, view in enumerate(whole.views):
            assert torch.equal(view, torch.cat([share.views[i] for share in shares]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_at_a_step_goes_on_as_if_never_stopped(source, num_workers):
    going_on = batches(source, 6, start_step=3, num_workers=num_workers)
    assert_equal(going_on, batches(source, 6)[3:])


def test_seeds_and_epochs_differ(source):
    first, other = batches(source, 4, batch_size=IMAGES), batches(source, 1, seed=4)
    assert not torch.equal(first[0].views[0][:8], other[0].views[0])
    views = {int(i): view for i, view in zip(first[0].index, first[0].views[0], strict=True)}
    assert not any(
        torch.equal(views[int(i)], view)
        for i, view in zip(first[1].index, first[1].views[0], strict=True)
    )


def test_the_global_random_state_is_left_alone(source):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    batches(source, 2)
    batches(source, 2, num_workers=1)
    assert torch.equal(torch.rand(1), expected)


def test_stopping_early_leaves_no_worker_behind(source):
    before = set(multiprocessing.active_children())
    stream = build_batches(source, RECIPES, batch_size=4, seed=0, stop_step=10**9, num_workers=2)
    assert len(list(itertools.islice(stream, 2))) == 2
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    assert set(multiprocessing.active_children()) == before


def test_workers_start_where_opencv_already_has_threads(source, tmp_path):
    """In a process of its own, which can be stopped if it hangs."""
    script = f"""
import cv2, numpy as np
from pretrain.data.loader import build_batches
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import view_recipes
cv2.setNumThreads(2)
source = open_source({str(tmp_path / "images")!r})
options = dict(batch_size=4, seed=0, stop_step=2, num_workers=2)
for _ in range(6):  # which of the threads is caught in what is a matter of luck
    cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (3000, 3000))
    assert len(list(build_batches(source, view_recipes("moco-v2", crop_size=32), **options))) == 2
    assert cv2.getNumThreads() == 2
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=ROOT)


def test_a_batch_that_ranks_cannot_share_is_an_error(source):
    with pytest.raises(UserError, match=r"batch of 8 cannot be divided among 3 ranks"):
        build_batches(source, RECIPES, batch_size=8, world_size=3, seed=0, stop_step=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_replaced_and_named(tmp_path, num_workers):
    folder = write_images(tmp_path / "images")
    whole = (folder / "03.jpg").read_bytes()
    (folder / "03.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "05.jpg").write_bytes(b"")
    (folder / "07.jpg").write_text("<html>404</html>")
    source = open_source(str(folder))
    (folder / "09.jpg").unlink()  # after it was listed
    results = batches(source, 4, batch_size=IMAGES, num_workers=num_workers)
    for batch in results:
        assert not {3, 5, 7, 9} & set(batch.index.tolist())
        assert all(view.amax((1, 2, 3)).min() > 0 for view in batch.views)
        named = {name.rsplit("/", 1)[1]: reason for name, reason in batch.skipped}
        assert set(named) == {"03.jpg", "05.jpg", "07.jpg", "09.jpg"}
        assert named["05.jpg"] == "the file is empty"
        assert "known format" in named["07.jpg"]
        assert "truncated" in named["03.jpg"]
        assert "No such file" in named["09.jpg"]
    assert_equal(results, batches(source, 4, batch_size=IMAGES))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_unreadable_images_are_an_error_that_names_some(tmp_path, num_workers):
    folder = write_images(tmp_path / "images")
    (folder / "03.jpg").write_bytes(b"")
    source = open_source(str(folder))
    with pytest.raises(UserError, match=r"more than the tolerated 5%.*03\.jpg: the file is empty"):
        batches(source, 200, num_workers=num_workers)
    assert len(batches(source, 200, max_bad_share=0.2)) == 200


def test_a_source_without_any_readable_image_is_an_error_at_once(tmp_path):
    folder = write_images(tmp_path / "images", 2)
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="could not be read"):
        batches(open_source(str(folder)), 1, batch_size=1)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(side: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_odd_images_are_shown_and_broken_ones_replaced_counted_and_named(tmp_path, num_workers):
    folder = write_images(tmp_path / "images", 40)
    red = Image.new("RGB", (60, 40), (250, 10, 10))
    turned = Image.Exif()
    turned[0x0112] = 8
    grey16 = Image.fromarray(np.full((40, 60), 40_000, np.uint16))
    odd = {
        "cmyk.jpg": encode(red.convert("CMYK")),
        "animated.gif": encode(
            red, "GIF", save_all=True, append_images=[Image.new("RGB", (60, 40))]
        ),
        "palette.png": encode(red.quantize(8), "PNG", transparency=0),
        "rotated.jpg": encode(red, exif=turned),
        "wide.jpg": encode(red.resize((30_000, 40))),
        "disguised.jpg": encode(red, "WEBP"),
    }
    whole = (folder / "00.jpg").read_bytes()
    broken = {
        "truncated.jpg": whole[: len(whole) // 2],
        "truncated.png": encode(red, "PNG")[:60],
        "empty.jpg": b"",
        "text.png": b"<html>404</html>",
        "16-bit.png": encode(grey16, "PNG"),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "huge.png": png_header(30_000),
    }
    for name, data in (odd | broken).items():
        (folder / name).write_bytes(data)
    (folder / "folder.jpg").mkdir()  # a folder, not an image: it is not listed
    source = open_source(str(folder))
    total = 40 + len(odd) + len(broken)
    assert len(source) == total
    results = batches(
        source, 2 * total // 4, batch_size=4, num_workers=num_workers, max_bad_share=1
    )
    shown = {source.name(int(i)).rsplit("/", 1)[1] for batch in results for i in batch.index}
    assert set(odd) <= shown
    assert not set(broken) & shown
    skipped = [name.rsplit("/", 1)[1] for batch in results for name, _ in batch.skipped]
    assert {name: skipped.count(name) >= 2 for name in skipped} == dict.fromkeys(broken, True)
    with pytest.raises(UserError, match="more than the tolerated 5%"):
        batches(source, 10**4, batch_size=4)

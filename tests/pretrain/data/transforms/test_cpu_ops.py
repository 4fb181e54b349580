"""Each pixel operation against torchvision's on Pillow images, with the same parameters."""

import functools
import io

import numpy as np
import pytest
import torchvision.transforms.functional as tv
from PIL import Image, ImageFilter, ImageOps

from pretrain.data.decoding import decode
from pretrain.data.transforms import cpu_ops as image_ops
from pretrain.data.transforms.recipes import ViewParameters, draw, render, view_recipes

TOLERANCE = 2.0  # mean absolute difference in steps of 255


def make_photograph(seed: int, height: int = 375, width: int = 500) -> np.ndarray:
    """uint8 RGB with the falling spectrum of photographs and both ends of the range clipped."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = np.maximum(np.hypot(y, x), 1 / width) ** -1.2
    fields = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, height, width))) * amplitude)
    fields = fields[:, :height, :width] / fields.std(axis=(1, 2), keepdims=True)
    mixing = np.array([[1, 0.4, 0.2], [1, -0.1, -0.4], [1, -0.4, 0.3]])
    pixels = 128 + 60 * np.tensordot(mixing, fields, 1).transpose(1, 2, 0)
    return pixels.clip(0, 255).astype(np.uint8)


PHOTOGRAPHS = [make_photograph(seed) for seed in range(4)]
SMALL = [np.ascontiguousarray(photograph[:224, :224]) for photograph in PHOTOGRAPHS]


def difference(ours: np.ndarray, pillow: Image.Image) -> float:
    assert ours.dtype == np.uint8
    return float(np.abs(ours.astype(int) - np.asarray(pillow).astype(int)).mean())


def pillow_colour(image: Image.Image, operation: tuple[str, float]) -> Image.Image:
    name, factor = operation
    if name == "grayscale":
        return tv.rgb_to_grayscale(image, num_output_channels=3)
    return getattr(tv, f"adjust_{name}")(image, factor)


def pillow_view(image: Image.Image, parameters: ViewParameters) -> Image.Image:
    size = [parameters.size, parameters.size]
    image = tv.resized_crop(image, *parameters.box, size)
    image = functools.reduce(pillow_colour, parameters.colour, image)
    if parameters.sigma:
        image = image.filter(ImageFilter.GaussianBlur(parameters.sigma))
    if parameters.solarize:
        image = ImageOps.solarize(image, threshold=128)
    return tv.hflip(image) if parameters.flip else image


@pytest.mark.parametrize(
    "box",
    [(0, 0, 375, 500), (20, 30, 300, 330), (100, 7, 224, 224), (3, 400, 150, 100), (9, 9, 1, 1)],
)
@pytest.mark.parametrize("size", [224, 64])
def test_resized_crop_is_pillows(box, size):
    for photograph in PHOTOGRAPHS[:2]:
        theirs = tv.resized_crop(Image.fromarray(photograph), *box, [size, size])
        assert difference(image_ops.resized_crop(photograph, box, size), theirs) < 0.5


@pytest.mark.parametrize(
    ("name", "factors", "tolerance"),
    [
        ("brightness", (0.0, 0.6, 0.9, 1.0, 1.1, 1.4), 0.1),
        ("contrast", (0.0, 0.6, 0.9, 1.0, 1.1, 1.4), 0.5),
        ("saturation", (0.0, 0.6, 0.9, 1.0, 1.1, 1.4), 0.5),
        ("hue", (-0.5, -0.4, -0.1, 0.0, 0.003, 0.1, 0.4, 0.5), TOLERANCE),
        ("grayscale", (1.0,), 0.1),
    ],
)
def test_a_colour_operation_is_pillows(name, factors, tolerance):
    for photograph in SMALL:
        for factor in factors:
            theirs = pillow_colour(Image.fromarray(photograph), (name, factor))
            ours = image_ops.apply_colour(photograph, [(name, factor)])
            assert difference(ours, theirs) < tolerance, factor


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.0, 1.4, 1.5, 2.0])
def test_blur_is_pillows(sigma):
    for photograph in SMALL:
        theirs = Image.fromarray(photograph).filter(ImageFilter.GaussianBlur(sigma))
        assert difference(image_ops.gaussian_blur(photograph, sigma), theirs) < 0.9


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_blur_leaves_a_plain_picture_alone(value):
    plain = np.full((32, 32, 3), value, np.uint8)
    for sigma in np.linspace(0.1, 2, 20):
        assert (image_ops.gaussian_blur(plain, sigma) == value).all()


def test_solarisation_is_pillows():
    for photograph in SMALL:
        theirs = ImageOps.solarize(Image.fromarray(photograph), threshold=128)
        assert (image_ops.solarize(photograph) == np.asarray(theirs)).all()


def test_fused_colour_is_the_sequence_of_its_operations():
    rng = np.random.default_rng(0)
    for photograph in SMALL:
        for _ in range(12):
            names = rng.choice(["brightness", "contrast", "saturation", "grayscale"], 4)
            chain = [(str(name), rng.uniform(0.6, 1.4)) for name in names]
            theirs = functools.reduce(pillow_colour, chain, Image.fromarray(photograph))
            assert difference(image_ops.apply_colour(photograph, chain), theirs) < 1.0, chain


def test_clipping_between_operations_is_kept():
    bright = np.full((8, 8, 3), 220, np.uint8)
    # 220 x 1.4 is clipped to 255 before it is darkened; without the clip it would be 184.
    ours = image_ops.apply_colour(bright, [("brightness", 1.4), ("brightness", 0.6)])
    assert np.abs(ours.astype(int) - 153).max() <= 1


@pytest.mark.parametrize("paper", ["moco-v1", "moco-v2", "simclr", "byol"])
def test_a_whole_view_is_pillows(paper):
    version = view_recipes(paper)[1]
    rng = np.random.default_rng(1)
    for photograph in PHOTOGRAPHS:
        for _ in range(4):
            parameters = draw(version, 375, 500, rng.random)
            theirs = pillow_view(Image.fromarray(photograph), parameters)
            assert difference(render(photograph, parameters), theirs) < TOLERANCE, parameters


def test_flip_mirrors_the_view():
    box = (10, 20, 200, 300)
    plain = render(PHOTOGRAPHS[0], ViewParameters(box, 64))
    assert (render(PHOTOGRAPHS[0], ViewParameters(box, 64, flip=True)) == plain[:, ::-1]).all()


def test_rendering_changes_neither_image_nor_type_and_fills_out():
    image = SMALL[0].copy()
    rng = np.random.default_rng(2)
    version = view_recipes("byol", crop_size=64)[1]
    out = np.zeros((64, 64, 3), np.uint8)
    for _ in range(20):
        parameters = draw(version, 224, 224, rng.random)
        assert render(image, parameters, out) is out
        assert (render(image, parameters) == out).all()
    assert (image == SMALL[0]).all()


def test_views_do_not_alias_the_image():
    image = SMALL[0].copy()
    view = render(image, ViewParameters((0, 0, 224, 224), 224))
    assert (view == image).all()
    view[:] = 0
    assert (image == SMALL[0]).all()


def test_decoding_smaller_changes_little():
    stream = io.BytesIO()
    Image.fromarray(make_photograph(5, 1200, 1600)).save(stream, "JPEG", quality=90)
    version = view_recipes("moco-v2")[0]
    full = decode(stream.getvalue())
    half = decode(stream.getvalue(), min_side=224, min_area=version.min_area)
    assert full.shape == (1200, 1600, 3)
    assert half.shape == (600, 800, 3)
    for box in ((0, 0, 300, 400), (150, 100, 260, 300)):
        twice = tuple(2 * value for value in box)
        theirs = tv.resized_crop(Image.fromarray(full), *twice, [224, 224])
        assert difference(image_ops.resized_crop(half, box, 224), theirs) < TOLERANCE

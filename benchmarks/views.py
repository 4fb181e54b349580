"""Two views of a JPEG on one core: ours against the usual pipeline on Pillow.

    python benchmarks/views.py [FOLDER] [--images 32] [--repeats 15]

The peer decodes once with Pillow, as torchvision's ImageFolder does, and passes the picture twice
through torchvision's transforms to a normalised float tensor. Ours decodes once and renders two
uint8 views; they are normalised on the device, in the step. The pipelines take turns within each
repeat; CPU time is counted, and the median over the repeats reported. Without FOLDER the images
are made here: 500x375 and about 90 kB, as in PASCAL VOC, with the falling spectrum of photographs.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from pretrain.loader import sample_rng
from pretrain.sources import open_source
from pretrain.views import ViewRecipe, decode, draw, recipe, render

Pipeline = Callable[[int, bytes], object]  # (index, encoded image) -> its two views


def make_photograph(rng: np.random.Generator, height: int = 375, width: int = 500) -> bytes:
    """A JPEG of correlated colours whose amplitude falls as 1 / frequency, as in photographs."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(y, x), 1 / width)
    noise = np.fft.rfft2(rng.normal(size=(3, height, width)))
    fields = np.fft.irfft2(noise * amplitude, (height, width))
    fields /= fields.std(axis=(1, 2), keepdims=True)
    mixing = np.array([[1.0, 0.3, 0.1], [1.0, -0.1, -0.2], [1.0, -0.3, 0.2]])  # mostly grey
    pixels = rng.uniform(90, 150) + 45 * np.tensordot(mixing, fields, 1).transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=84)
    return stream.getvalue()


def torchvision_pipeline(recipe: ViewRecipe) -> Pipeline:
    """The recipe as it is usually written with torchvision's transforms."""
    jitter = transforms.ColorJitter(
        recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue
    )
    colour = [
        transforms.RandomApply([jitter], p=recipe.jitter_probability),
        transforms.RandomGrayscale(p=recipe.grayscale_probability),
    ]

    def blur(image: Image.Image) -> Image.Image:
        sigma = float(torch.empty(1).uniform_(*recipe.blur_sigma))
        return image.filter(ImageFilter.GaussianBlur(radius=sigma))

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(recipe.crop_size, recipe.scale, recipe.ratio),
            *(reversed(colour) if recipe.grayscale_first else colour),
            transforms.RandomApply([blur], p=recipe.blur_probability),
            transforms.RandomHorizontalFlip(recipe.flip_probability),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )

    def run(index: int, data: bytes) -> object:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return transform(image), transform(image)

    return run


def our_pipeline(recipe: ViewRecipe) -> Pipeline:
    """What the loader does for one sample."""
    size = recipe.crop_size
    views = np.empty((2, size, size, 3), np.uint8)

    def run(index: int, data: bytes) -> object:
        rng = sample_rng(0, index)
        image = decode(data, min_side=size, min_area=recipe.min_area)
        for view in views:
            render(image, draw(recipe, *image.shape[:2], rng), view)
        return views

    return run


def decode_only(index: int, data: bytes) -> object:
    return decode(data)


def measure(
    pipelines: dict[str, Pipeline], images: Sequence[bytes], repeats: int
) -> dict[str, float]:
    """Milliseconds of CPU time an image of each pipeline: median over the repeats."""
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for repeat in range(-1, repeats):  # the first round warms up
        for name, pipeline in pipelines.items():
            start = time.thread_time()
            for i, data in enumerate(images):
                pipeline((repeat + 1) * len(images) + i, data)
            if repeat >= 0:
                times[name].append((time.thread_time() - start) / len(images) * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="photographs to measure with")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args(argv)

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    if args.folder:
        source = open_source(args.folder)
        images = [source.read(int(i)) for i in rng.integers(len(source), size=args.images)]
    else:
        images = [make_photograph(rng) for _ in range(args.images)]

    pipelines: dict[str, Pipeline] = {"decode only": decode_only}
    for version in ("v1", "v2"):
        pipelines[f"torchvision {version}"] = torchvision_pipeline(recipe(f"moco-{version}"))
        pipelines[f"ours {version}"] = our_pipeline(recipe(f"moco-{version}"))
    times = measure(pipelines, images, args.repeats)

    size = np.mean([len(data) for data in images]) / 1e3
    print(
        f"two views of {len(images)} images, {size:.0f} kB each, {args.repeats} repeats, one core"
    )
    for name, milliseconds in times.items():
        print(
            f"{name:16s} {milliseconds:7.2f} ms an image {1e3 / milliseconds:7.0f} images/s"
            f" {milliseconds / times['decode only']:6.2f} x decode only"
        )
    for version in ("v1", "v2"):
        ratio = times[f"torchvision {version}"] / times[f"ours {version}"]
        print(f"ratio views_{version} {ratio:.2f}")


if __name__ == "__main__":
    main()

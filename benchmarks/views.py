"""Two views of a JPEG on one core, compared with the usual pipeline on Pillow.

    python benchmarks/views.py [FOLDER] [--images 32] [--repeats 15]

The peer decodes once with Pillow, as torchvision's ImageFolder does, and applies torchvision's
transforms twice to get normalised float tensors. Ours is the loader, up to batches of two uint8
views, which the training step normalises on the device. "device" leaves colour and blur to the
device; only the CPU's part is timed. The pipelines take turns in each repetition, and the median
CPU time is reported. Without FOLDER, images are generated: 500x375 and about 90 kB, as in PASCAL
VOC, with the falling spectrum of photographs.
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

from benchmarks.turns import take_turns
from pretrain.data.decoding import decode
from pretrain.data.loader import build_batches
from pretrain.data.source_base import Source
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import ViewRecipe, view_recipes

Pipeline = Callable[[], object]  # makes the views of all images at each call


class InMemory(Source):
    """Encoded images in memory."""

    def __init__(self, images: Sequence[bytes]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> bytes:
        return self.images[index]

    def name(self, index: int) -> str:
        return str(index)


def make_photograph(rng: np.random.Generator, height: int = 375, width: int = 500) -> bytes:
    """Make a JPEG of correlated colours with amplitudes of 1 / frequency, as in photographs."""
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


def torchvision_pipeline(images: Sequence[bytes], recipe: ViewRecipe) -> Pipeline:
    """Return the recipe as usually written with torchvision's transforms."""
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

    def run() -> None:
        for data in images:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            _ = transform(image), transform(image)

    return run


def our_pipeline(images: Sequence[bytes], recipes: Sequence[ViewRecipe]) -> Pipeline:
    batches = build_batches(
        InMemory(images), recipes, batch_size=len(images), seed=0, stop_step=10**6
    )
    return lambda: next(batches)


def measure(pipelines: dict[str, Pipeline], images: int, repeats: int) -> dict[str, np.ndarray]:
    """Measure the CPU milliseconds per image of each pipeline, one value per repetition."""
    times = take_turns(pipelines, repeats, time.thread_time)
    return {name: np.array(values) / images for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="folder of photographs (default: generated)")
    parser.add_argument("--images", type=int, default=32, help="number of images (32)")
    parser.add_argument("--repeats", type=int, default=15, help="timed repetitions (15)")
    args = parser.parse_args(argv)

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    if args.folder:
        source = open_source(args.folder)
        images = [source.read(int(i)) for i in rng.integers(len(source), size=args.images)]
    else:
        images = [make_photograph(rng) for _ in range(args.images)]

    pipelines: dict[str, Pipeline] = {"decode only": lambda: [decode(data) for data in images]}
    for version in ("v1", "v2"):
        recipes = view_recipes(f"moco-{version}")
        pipelines[f"torchvision {version}"] = torchvision_pipeline(images, recipes[0])
        pipelines[f"ours {version}"] = our_pipeline(images, recipes)
    pipelines["ours v2_device"] = our_pipeline(images, view_recipes("moco-v2", on_device=True))
    times = measure(pipelines, len(images), args.repeats)

    size = np.mean([len(data) for data in images]) / 1e3
    print(
        f"two views of {len(images)} images of {size:.0f} kB, {args.repeats} repetitions, one core"
    )
    for name, values in times.items():
        middle, low, high = np.percentile(values, (50, 25, 75))
        print(
            f"{name:16s} {middle:6.2f} ms per image ({low:.2f} to {high:.2f}) {1e3 / middle:6.0f}"
            f" images/s {np.median(values / times['decode only']):6.2f} x decode only"
        )
    for claim in ("v1", "v2", "v2_device"):
        ratios = times[f"torchvision {claim[:2]}"] / times[f"ours {claim}"]
        print(f"ratio views_{claim} {np.median(ratios):.2f}")


if __name__ == "__main__":
    main()

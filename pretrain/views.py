"""Two different looks at one photograph: recipes, the parameters they draw, the picture they give.

The randomness is drawn apart from the work, so that a view is a pure function of (image,
parameters). The distributions and the order of the operations are those of torchvision's
`RandomResizedCrop`, `ColorJitter`, `RandomGrayscale` and `RandomHorizontalFlip`, which MoCo's
recipes are made of; the pixel operations agree with Pillow's (see `image_ops`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pretrain import image_ops
from pretrain.decoding import DecodeError, decode

__all__ = ["DecodeError", "ViewParameters", "ViewRecipe", "decode", "draw", "recipe", "render"]


@dataclass(frozen=True)
class ViewRecipe:
    """The distribution of one view.

    Attributes:
        crop_size: side of the view in pixels.
        scale, ratio: area of the crop as a share of the image's, and its width over height.
        brightness, contrast, saturation: a factor is uniform in [max(0, 1 - x), 1 + x].
        hue: the shift is uniform in [-x, x], in turns of the colour wheel; at most 0.5.
        jitter_probability: of the four above, which come in random order.
        grayscale_first: whether greying comes before the jitter (MoCo v1) or after it (v2).
        blur_sigma: standard deviation of the Gaussian in pixels of the view, uniform.
    """

    crop_size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 0.0
    grayscale_probability: float = 0.0
    grayscale_first: bool = False
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_probability: float = 0.5

    @property
    def min_area(self) -> int:
        """Pixels that an image needs for its smallest crop to have `crop_size` a side."""
        return math.ceil(self.crop_size**2 * max(self.ratio[1], 1 / self.ratio[0]) / self.scale[0])


_RECIPES = {
    # He et al. 2020, section 3.3, "Technical details"
    "moco-v1": {
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.4,
        "jitter_probability": 1.0,
        "grayscale_probability": 0.2,
        "grayscale_first": True,
    },
    # Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning", section 3
    "moco-v2": {
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
        "jitter_probability": 0.8,
        "grayscale_probability": 0.2,
        "blur_probability": 0.5,
    },
}


def recipe(name: str, crop_size: int = 224, min_scale: float = 0.2) -> ViewRecipe:
    """The recipe of a paper, ``moco-v1`` or ``moco-v2``; `ValueError` for another name."""
    if name not in _RECIPES:
        raise ValueError(f"unknown view recipe {name!r}: choose from {', '.join(_RECIPES)}")
    return ViewRecipe(crop_size=crop_size, scale=(min_scale, 1.0), **_RECIPES[name])  # type: ignore[arg-type]


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for one view.

    Attributes:
        box: top, left, height, width of the crop in the image's pixels.
        size: side of the view.
        colour: operations of `image_ops.apply_colour` with their factors, in order.
        sigma: standard deviation of the blur, 0 for none.
        flip: whether left and right are swapped.
    """

    box: tuple[int, int, int, int]
    size: int
    colour: tuple[tuple[str, float], ...] = ()
    sigma: float = 0.0
    flip: bool = False


def draw(recipe: ViewRecipe, height: int, width: int, rng: np.random.Generator) -> ViewParameters:
    """Draws the parameters of one view of an image of height x width pixels."""
    random = iter(rng.random(_MAX_DRAWS).tolist()).__next__  # one call: 10 times as fast as many

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * random()

    box = _draw_box(recipe, height, width, uniform)
    colour: list[tuple[str, float]] = []
    if random() < recipe.jitter_probability:
        for name in sorted(_JITTER, key=lambda _: random()):  # in random order
            strength = getattr(recipe, name)
            if name == "hue":
                colour.append((name, uniform(-strength, strength)))
            elif strength > 0:
                colour.append((name, uniform(max(0.0, 1 - strength), 1 + strength)))
    if random() < recipe.grayscale_probability:
        colour.insert(0 if recipe.grayscale_first else len(colour), ("grayscale", 1.0))
    sigma = uniform(*recipe.blur_sigma) if random() < recipe.blur_probability else 0.0
    flip = random() < recipe.flip_probability
    return ViewParameters(box, recipe.crop_size, tuple(colour), sigma, flip)


_JITTER = ("brightness", "contrast", "saturation", "hue")
_MAX_BOXES = 10
_MAX_DRAWS = 4 * _MAX_BOXES + 2 * len(_JITTER) + 5  # what `draw` takes at most


def _draw_box(
    recipe: ViewRecipe, height: int, width: int, uniform: Callable[[float, float], float]
) -> tuple[int, int, int, int]:
    log_ratios = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    for _ in range(_MAX_BOXES):
        area = height * width * uniform(*recipe.scale)
        ratio = math.exp(uniform(*log_ratios))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(uniform(0, height - h + 1)), int(uniform(0, width - w + 1)), h, w
    # No such box fits: the largest one of an allowed ratio, in the centre.
    ratio = min(max(width / height, recipe.ratio[0]), recipe.ratio[1])
    h = min(height, max(1, round(width / ratio)))
    w = min(width, max(1, round(height * ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def render(
    image: np.ndarray, parameters: ViewParameters, out: np.ndarray | None = None
) -> np.ndarray:
    """The view: crop and resize, colour, blur, flip.

    Args:
        image: uint8 (H, W, 3), RGB; not changed.
        out: optional uint8 (size, size, 3), contiguous, that receives the view.

    Returns:
        uint8 (size, size, 3), RGB; `out` where it was given.
    """
    view = image_ops.resized_crop(image, parameters.box, parameters.size)
    view = image_ops.apply_colour(view, parameters.colour)
    if parameters.sigma > 0:
        view = image_ops.gaussian_blur(view, parameters.sigma)
    if out is None:
        out = np.empty_like(view)
    return image_ops.copy_flipped(view, out) if parameters.flip else image_ops.copy(view, out)

"""Augmented views of an image: recipes, the parameters drawn from them, and rendering.

Drawing is separate from rendering, so that a view is a pure function of (image, parameters). The
distributions and the order of the operations are those of torchvision's `RandomResizedCrop`,
`ColorJitter`, `RandomGrayscale` and `RandomHorizontalFlip`, which the papers' recipes consist of;
the pixel operations agree with Pillow's (see `cpu_ops`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from fvcore.common.config import CfgNode

from moco_common.errors import UserError
from pretrain.data.transforms import cpu_ops


@dataclass(frozen=True)
class ViewRecipe:
    """The distribution of one view.

    Attributes:
        crop_size: side of the view in pixels.
        scale, ratio: ranges of the crop's area, as a share of the image's, and of its width
            divided by its height.
        brightness, contrast, saturation: strength x; the factor is uniform in
            [max(0, 1 - x), 1 + x].
        hue: strength x, at most 0.5; the shift is uniform in [-x, x], in turns.
        jitter_probability: probability of the four above, which are applied in random order.
        grayscale_first: True to convert to greyscale before the jitter (MoCo v1), not after it.
        blur_sigma: range of the Gaussian's standard deviation, uniform, in pixels of the view.
        solarize_probability: probability of inverting values of 128 and above, after the blur.
        on_device: True to leave colour, blur and solarisation to `gpu_ops.finish`.
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
    solarize_probability: float = 0.0
    flip_probability: float = 0.5
    on_device: bool = False

    @property
    def min_area(self) -> int:
        """Smallest image area, in pixels, at which no crop is enlarged to `crop_size`."""
        return math.ceil(self.crop_size**2 * max(self.ratio[1], 1 / self.ratio[0]) / self.scale[0])


def _jitter(
    brightness: float, contrast: float, saturation: float, hue: float, probability: float = 0.8
) -> ViewRecipe:
    return ViewRecipe(
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        jitter_probability=probability,
        grayscale_probability=0.2,  # the same in all of these papers
    )


# He et al. 2020, "Momentum Contrast", section 3.3, "Technical details"
_MOCO_V1 = replace(_jitter(0.4, 0.4, 0.4, 0.4, probability=1.0), grayscale_first=True)
# Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning", section 3
_MOCO_V2 = replace(_jitter(0.4, 0.4, 0.4, 0.1), blur_probability=0.5)
# Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
# appendix A, strength 1; also in Caron et al. 2020, "Unsupervised Learning of Visual Features by
# Contrasting Cluster Assignments"
_SIMCLR = replace(_jitter(0.8, 0.8, 0.8, 0.2), blur_probability=0.5)
# Grill et al. 2020, "Bootstrap Your Own Latent", appendix B, table 6: two different recipes
_BYOL = replace(_jitter(0.4, 0.4, 0.2, 0.1), blur_probability=1.0)
_BYOL_PRIME = replace(_BYOL, blur_probability=0.1, solarize_probability=0.2)
_PAIRS = {
    "moco-v1": (_MOCO_V1, _MOCO_V1),
    "moco-v2": (_MOCO_V2, _MOCO_V2),
    "simclr": (_SIMCLR, _SIMCLR),
    "byol": (_BYOL, _BYOL_PRIME),
    "swav": (_SIMCLR, _SIMCLR),
}
_SMALLEST_CROP = 0.05  # smallest multi-crop area as a share of the image (Caron et al., sec. 3.3)


def view_recipes(
    augmentation: str,
    *,
    crop_size: int = 224,
    min_scale: float = 0.2,
    small_crops: int = 0,
    small_crop_size: int = 96,
    small_scale: float = 0.14,
    on_device: bool = False,
) -> list[ViewRecipe]:
    """Return the recipes of a paper's views: a pair, followed by the small crops, if any.

    Args:
        augmentation: ``moco-v1``, ``moco-v2``, ``simclr``, ``byol`` or ``swav``.
        min_scale: smallest area of a crop, as a share of the image.
        small_crops: number of small views added by multi-crop. Their areas range from 0.05 to
            `small_scale`; those of the pair then range from `small_scale`, instead of
            `min_scale`, to 1.

    Raises:
        UserError: the augmentation is unknown.
    """
    if augmentation not in _PAIRS:
        raise UserError(
            f"INPUT.AUGMENTATION {augmentation!r} is unknown: choose from {', '.join(_PAIRS)}"
        )
    pair = _PAIRS[augmentation]
    large = (small_scale if small_crops else min_scale, 1.0)
    small = (min(_SMALLEST_CROP, small_scale), small_scale)
    sizes = [(crop_size, large)] * 2 + [(small_crop_size, small)] * small_crops
    return [
        replace(pair[i % 2], crop_size=size, scale=scale, on_device=on_device)
        for i, (size, scale) in enumerate(sizes)
    ]


@dataclass(frozen=True)
class ViewParameters:
    """The parameters drawn for one view.

    Attributes:
        box: (top, left, height, width) of the crop, in pixels of the image.
        size: side of the view, in pixels.
        colour: operations of `cpu_ops.apply_colour` with their factors, in order.
        sigma: standard deviation of the blur, 0 for none.
        solarize: True to invert values of 128 and above.
        flip: True to flip horizontally.
    """

    box: tuple[int, int, int, int]
    size: int
    colour: tuple[tuple[str, float], ...] = ()
    sigma: float = 0.0
    solarize: bool = False
    flip: bool = False

    @property
    def geometry(self) -> "ViewParameters":
        """Crop, resize and flip only; the other operations commute with the flip and may follow."""
        return ViewParameters(self.box, self.size, flip=self.flip)

    def place(self, height: int, width: int) -> tuple[float, float, float, float, float]:
        """Return left, top, right and bottom of the crop as fractions of an image of height x width
        pixels, and whether it is flipped, 0 or 1."""
        top, left, h, w = self.box
        edges = left / width, top / height, (left + w) / width, (top + h) / height
        return (*edges, float(self.flip))


def draw(
    recipe: ViewRecipe, height: int, width: int, random: Callable[[], float]
) -> ViewParameters:
    """Draw the parameters of one view of an image of height x width pixels.

    Args:
        random: returns uniform numbers in [0, 1); called at most `MAX_DRAWS` times.
    """

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
    solarize = random() < recipe.solarize_probability
    flip = random() < recipe.flip_probability
    return ViewParameters(box, recipe.crop_size, tuple(colour), sigma, solarize, flip)


_JITTER = ("brightness", "contrast", "saturation", "hue")
_MAX_BOXES = 10
MAX_DRAWS = 4 * _MAX_BOXES + 2 * len(_JITTER) + 6


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
    # No drawn box fits: take the largest centred one of an allowed ratio.
    ratio = min(max(width / height, recipe.ratio[0]), recipe.ratio[1])
    h = min(height, max(1, round(width / ratio)))
    w = min(width, max(1, round(height * ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def render(
    image: np.ndarray, parameters: ViewParameters, out: np.ndarray | None = None
) -> np.ndarray:
    """Render a view: crop and resize, colour, blur, solarisation, flip.

    Args:
        image: uint8 (H, W, 3), RGB; not modified.
        out: optional uint8 (size, size, 3), contiguous, to write the view to.

    Returns:
        uint8 (size, size, 3), RGB; `out` if it was given.
    """
    view = cpu_ops.resized_crop(image, parameters.box, parameters.size)
    view = cpu_ops.apply_colour(view, parameters.colour)
    if parameters.sigma > 0:
        view = cpu_ops.gaussian_blur(view, parameters.sigma)
    if parameters.solarize:
        view = cpu_ops.solarize(view)
    if out is None:
        out = np.empty_like(view)
    return cpu_ops.copy_flipped(view, out) if parameters.flip else cpu_ops.copy(view, out)


def build_recipes(cfg: CfgNode) -> list[ViewRecipe]:
    """Build the recipes of all views from the keys of ``INPUT``."""
    return view_recipes(
        cfg.INPUT.AUGMENTATION,
        crop_size=cfg.INPUT.CROP_SIZE,
        min_scale=cfg.INPUT.MIN_SCALE,
        small_crops=cfg.INPUT.SMALL_CROPS,
        small_crop_size=cfg.INPUT.SMALL_CROP_SIZE,
        small_scale=cfg.INPUT.SMALL_SCALE,
        on_device=cfg.INPUT.ON_DEVICE,
    )

"""The demo's images: textured objects, generated.

Eight classes differ in the *texture* of their objects alone. Shape, size, slant and period are
drawn at random, the inks are the same everywhere, and untextured clutter lies between the objects,
so that a detector has to recognise textures. Unlabelled images are portraits, one object that fills
the frame; labelled images are scenes of several objects. They differ as ImageNet and VOC do.

    image number -> random generator -> paper -> objects and clutter, back to front -> camera
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

CLASSES = ("stripes", "checks", "dots", "rings", "zigzag", "blobs", "bricks", "grid")
# Size relative to the side of the image.
OBJECT_EXTENT = (0.22, 0.55)
CLUTTER_EXTENT = (0.06, 0.18)
# Two inks on one paper, RGB. If each object had its own colour, colour would distinguish images and
# textures would not have to be learnt.
LIGHT = np.array([246, 226, 180], np.float32)
DARK = np.array([38, 52, 104], np.float32)
PAPER = np.array([128, 140, 136], np.float32)
Image = NDArray[np.uint8]
Field = NDArray[np.float32]


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: its class (an index of `CLASSES`) and its visible pixels."""

    category: int
    mask: NDArray[np.bool_]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 of the visible pixels, the last two exclusive."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class Kind:
    """Properties shared by the objects of one kind in a scene: class and look of the texture."""

    category: int
    period: float  # pixels
    angle: float  # radians


def texture(kind: Kind, size: int, rng: np.random.Generator) -> Field:
    """The texture of a kind over size x size pixels, values in [0, 1], with a random offset."""
    offset_x, offset_y = rng.uniform(0, 64, 2)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    u = ((x + offset_x) * np.cos(kind.angle) + (y + offset_y) * np.sin(kind.angle)) / kind.period
    v = ((y + offset_y) * np.cos(kind.angle) - (x + offset_x) * np.sin(kind.angle)) / kind.period
    name = CLASSES[kind.category]
    if name == "stripes":
        wave = np.sin(2 * np.pi * u)
    elif name == "checks":
        wave = 1.6 * np.sin(np.pi * u) * np.sin(np.pi * v)
    elif name == "dots":
        wave = 6.0 * (0.32 - np.hypot(u % 1.0 - 0.5, v % 1.0 - 0.5))
    elif name == "rings":
        centre = size / 2 + rng.uniform(-6, 6, 2)
        wave = np.sin(2 * np.pi * np.hypot(x - centre[0], y - centre[1]) / kind.period)
    elif name == "zigzag":
        wave = np.sin(2 * np.pi * (u + 0.9 * np.abs(v * 0.7 % 1.0 - 0.5)))
    elif name == "blobs":
        noise = rng.standard_normal((size, size)).astype(np.float32)
        smooth = cv2.GaussianBlur(noise, (0, 0), kind.period / 4)
        wave = 1.5 * (smooth - smooth.mean()) / smooth.std()
    elif name == "bricks":
        row = np.floor(v * 1.2)
        gap_v = np.abs(v * 1.2 % 1.0 - 0.5)
        gap_u = np.abs((u * 0.6 + 0.5 * (row % 2)) % 1.0 - 0.5)
        wave = 8.0 * np.minimum(0.36 - gap_v, (0.43 - gap_u) * 1.6)
    else:  # grid
        lines = np.maximum(np.abs(u % 1.0 - 0.5), np.abs(v % 1.0 - 0.5))
        wave = 10.0 * (lines - 0.36)
    values: Field = (0.5 + 0.5 * np.clip(2.0 * wave, -1, 1)).astype(np.float32)
    return values


def draw_scene(
    rng: np.random.Generator, size: int = 128, kinds: tuple[int, int] = (1, 2)
) -> tuple[Image, list[SceneObject]]:
    """Draw one scene.

    Args:
        rng: source of all randomness.
        size: side of the square image, pixels; objects measure 0.2 to 0.55 of it.
        kinds: minimum and maximum number of kinds of objects in the scene.

    Returns:
        RGB image (size, size, 3) and its objects, each at least 60 % visible.
    """
    canvas = _background(rng, size)
    palette = [_kind(rng, size) for _ in range(rng.integers(kinds[0], kinds[1] + 1))]
    plan = ["clutter"] * int(rng.integers(2, 5)) + ["object"] * int(rng.integers(3, 7))
    rng.shuffle(plan)
    drawn: list[tuple[int, NDArray[np.bool_], int]] = []  # category, visible mask, full area
    for what in plan:
        extent = CLUTTER_EXTENT if what == "clutter" else OBJECT_EXTENT
        mask = _place(rng, size, [mask for _, mask, _ in drawn], extent)
        if mask is None:
            continue
        for i, (category, visible, area) in enumerate(drawn):
            drawn[i] = (category, visible & ~mask, area)
        if what == "clutter":
            paint = np.broadcast_to(rng.uniform(DARK, LIGHT), (size, size, 3)).astype(np.float32)
        else:
            kind = palette[int(rng.integers(len(palette)))]
            paint = _textured(rng, kind, size)
            drawn.append((kind.category, mask, int(mask.sum())))
        canvas = _paint(rng, canvas, mask, paint)
    objects = [
        SceneObject(category, visible)
        for category, visible, area in drawn
        if visible.sum() >= 0.6 * area
    ]
    return _finish(rng, canvas), objects


def draw_portrait(rng: np.random.Generator, size: int = 96) -> Image:
    """Draw one unlabelled image: a single object that fills most of the frame.

    Its texture has the same size in pixels as in a scene.
    """
    canvas = _background(rng, size)
    kind = _kind(rng, 128)
    mask = None
    while mask is None:
        mask = _place(rng, size, [], (0.9, 1.4))
    canvas = _paint(rng, canvas, mask, _textured(rng, kind, size))
    return _finish(rng, canvas)


def _textured(rng: np.random.Generator, kind: Kind, size: int) -> Field:
    pattern = texture(kind, size, rng)[..., None]
    return (pattern * LIGHT + (1 - pattern) * DARK).astype(np.float32)


def _paint(rng: np.random.Generator, canvas: Field, mask: NDArray[np.bool_], paint: Field) -> Field:
    """Lay paint over the masked pixels, lit from one side."""
    alpha = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.6)[..., None]
    light = _slope(rng, len(mask), 0.85, 1.1)[..., None]
    return (canvas * (1 - alpha) + paint * light * alpha).astype(np.float32)


def _finish(rng: np.random.Generator, canvas: Field) -> Image:
    """The camera: a slight blur and noise."""
    blurred = cv2.GaussianBlur(canvas, (0, 0), float(rng.uniform(0.3, 0.7)))
    noisy = blurred + rng.normal(0, rng.uniform(2, 7), canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _kind(rng: np.random.Generator, size: int) -> Kind:
    return Kind(
        category=int(rng.integers(len(CLASSES))),
        period=float(rng.uniform(0.06, 0.09) * size),
        angle=float(rng.uniform(-0.3, 0.3)),
    )


def _slope(rng: np.random.Generator, size: int, low: float, high: float) -> Field:
    """A linear ramp in a random direction, from ``low`` to ``high``."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    ramp = np.clip((x * np.cos(angle) + y * np.sin(angle)) / 1.4 + 0.5, 0, 1)
    values: Field = (low + (high - low) * ramp).astype(np.float32)
    return values


def _background(rng: np.random.Generator, size: int) -> Field:
    """Paper under cloudy noise of three scales."""
    clouds = np.zeros((size, size), np.float32)
    for cells in (3, 7, 15):
        noise = rng.normal(0, 12, (cells, cells)).astype(np.float32)
        clouds += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return PAPER + clouds[..., None]


def _place(
    rng: np.random.Generator,
    size: int,
    taken: list[NDArray[np.bool_]],
    extent_range: tuple[float, float],
) -> NDArray[np.bool_] | None:
    """The mask of a random shape that hides at most a fifth of any object; None if none fits."""
    for _ in range(12):
        extent = size * rng.uniform(*extent_range)
        aspect = float(np.exp(rng.uniform(-0.35, 0.35)))
        half = np.array([extent * aspect, extent / aspect]) / 2
        margin = min(0.35 * extent, 0.45 * size)
        centre = rng.uniform(margin, size - margin, 2)
        mask = np.zeros((size, size), np.uint8)
        turn = float(rng.uniform(0, 180))
        shape = int(rng.integers(3))
        if shape == 0:
            axes = tuple(half.astype(int).tolist())
            cv2.ellipse(mask, centre.astype(int).tolist(), axes, turn, 0, 360, 1, -1)
        elif shape == 1:
            corners = cv2.boxPoints((tuple(centre.tolist()), tuple((1.7 * half).tolist()), turn))
            cv2.fillPoly(mask, [corners.round().astype(np.int32)], 1)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
            radii = rng.uniform(0.75, 1.1, 7)[:, None] * half
            points = centre + radii * np.stack([np.cos(angles), np.sin(angles)], 1)
            cv2.fillPoly(mask, [points.round().astype(np.int32)], 1)
        found = mask.astype(bool)
        area = int(found.sum())
        enough = area > 0.2 * extent**2
        if enough and all((found & other).sum() <= 0.2 * min(area, other.sum()) for other in taken):
            return found
    return None

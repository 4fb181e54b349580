"""Annotated or detected objects drawn on an image."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from moco_common.figures import save_pixels
from moco_det.structures.objects import Objects
from moco_det.visualization.palette import palette, tint
from moco_det.visualization.visualizer import DASHED, DOTTED, SOLID, ObjectVisualizer

CELL = 320  # pixels of an image's long side in a grid, and at least of a picture
MOST_LABELS = 20  # on CELL x CELL pixels; more would hide the image
MASK_OPACITY = 0.4


def draw_objects(
    image: NDArray[np.uint8],
    objects: Objects,
    class_names: Sequence[str],
    right: NDArray[np.bool_] | None = None,
    with_names: bool = True,
) -> NDArray[np.uint8]:
    """Draw objects on a copy of an RGB image (H, W, 3).

    Boxes and masks have their class's colour, and a label with its name and the score. Wrong
    detections are dashed, ignored annotations dotted. Where objects are crowded (more than 20 on
    320 x 320 pixels) there are no labels.

    Args:
        right: (N,) whether each detection is right; None where that is not known.
        with_names: whether labels hold the class name.
    """
    colors = palette(len(class_names))[objects.classes]
    drawn = image.copy()
    if objects.masks is not None:
        for index in np.argsort(-objects.areas(), kind="stable"):
            _draw_mask(drawn, objects.masks[index], colors[index])
    visualizer = ObjectVisualizer(drawn)
    crowded = len(objects) * CELL**2 > MOST_LABELS * image.shape[0] * image.shape[1]
    labels = _labels(objects, class_names, with_names) if not crowded else None
    ignored = objects.ignored_or_none()
    right = np.ones(len(objects), dtype=bool) if right is None else right
    styles = ((SOLID, right & ~ignored), (DASHED, ~right & ~ignored), (DOTTED, ignored))
    for style, chosen in styles:
        visualizer.line_style = style
        visualizer.overlay_instances(
            boxes=objects.boxes[chosen],
            labels=labels and [labels[index] for index in np.flatnonzero(chosen)],
            assigned_colors=list(colors[chosen] / 255),
        )
    return visualizer.pixels()


def save_picture(
    image: NDArray[np.uint8], objects: Objects, class_names: Sequence[str], path: str | Path
) -> Path:
    """Write an RGB image with its objects as PNG, at its own size (small images enlarged)."""
    if max(image.shape[:2]) < CELL:
        image, objects = resize(image, objects, CELL)
    return save_pixels(draw_objects(image, objects, class_names), path)


def resize(
    image: NDArray[np.uint8], objects: Objects, long_side: int
) -> tuple[NDArray[np.uint8], Objects]:
    """Resize an image and its objects to `long_side` pixels on the longer side."""
    height, width = image.shape[:2]
    scale = long_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    resized = np.asarray(cv2.resize(image, size, interpolation=method), dtype=np.uint8)
    masks = objects.masks
    if masks is not None:
        soft = [cv2.resize(mask.astype(np.float32), size) for mask in masks]
        masks = np.array(soft).reshape(-1, size[1], size[0]) > 0.5  # there may be none
    boxes = objects.boxes * np.array([size[0] / width, size[1] / height] * 2)
    return resized, replace(objects, boxes=boxes, masks=masks)


def _draw_mask(image: NDArray[np.uint8], mask: NDArray[np.bool_], color: NDArray[np.uint8]) -> None:
    """Tint a mask and outline it, in place."""
    if not mask.any():
        return
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    image, mask = image[y : y + height, x : x + width], mask[y : y + height, x : x + width]
    tint(image, mask, color, MASK_OPACITY)
    inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0)
    image[mask & (inside == 0)] = color


def _labels(objects: Objects, class_names: Sequence[str], with_names: bool) -> list[str] | None:
    """The label of each object; None where labels would be empty."""
    parts = []
    if with_names:
        parts.append([str(class_names[category]) for category in objects.classes])
    if objects.scores is not None:
        parts.append([f"{score:.2f}" for score in objects.scores])
    return [" ".join(words) for words in zip(*parts, strict=True)] if parts else None

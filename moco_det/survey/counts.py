"""Counts of a data set: images and objects, by class and by size, as values and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from tabulate import tabulate

from moco_common.text import counted
from moco_det.data.datasets.label_files import read_labels

Records = Sequence[Mapping[str, Any]]
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # COCO's areas
PERCENTILES = (5, 50, 95)
RARE = ("ignored", "masks")  # columns that are shown only where there are any


def count_objects(records: Records, classes: Sequence[str]) -> dict[str, Any]:
    """Count the images and objects of Detectron2's dataset dicts.

    Returns:
        ``images``, ``image_sizes`` (see `sizes_of`), ``objects``, ``objects_per_image`` (``least``,
        ``median``, ``mean``, ``most``), ``box_sides`` (percentile -> square root of the box area in
        pixels) and ``classes``: name -> ``objects``, ``images``, ``small``, ``medium`` and
        ``large`` (by box area, COCO's limits), ``ignored`` (crowds and difficult objects) and
        ``masks``.
    """
    names = [str(name) for name in classes]
    table = {
        name: dict.fromkeys(("objects", "images", *SIZES, "ignored", "masks"), 0) for name in names
    }
    counts, areas = [], []
    for record in records:
        items = record.get("annotations", ())
        counts.append(len(items))
        for index in {item["category_id"] for item in items}:
            table[names[index]]["images"] += 1
        for item in items:
            row = table[names[item["category_id"]]]
            x0, y0, x1, y1 = BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS)
            area = float((x1 - x0) * (y1 - y0))
            areas.append(area)
            row["objects"] += 1
            row["ignored"] += bool(item.get("iscrowd") or item.get("difficult"))
            row["masks"] += "segmentation" in item
            for size, (least, most) in SIZES.items():
                row[size] += least <= area < most
    sides = np.sqrt(areas) if areas else np.zeros(0)
    return {
        "images": len(records),
        "image_sizes": sizes_of([(record["width"], record["height"]) for record in records]),
        "objects": len(areas),
        "objects_per_image": {
            "least": min(counts, default=0),
            "median": float(np.median(counts)) if counts else 0.0,
            "mean": float(np.mean(counts)) if counts else 0.0,
            "most": max(counts, default=0),
        },
        "box_sides": {str(p): float(np.percentile(sides, p)) for p in PERCENTILES if len(sides)},
        "classes": table,
    }


def count_pixels(records: Records, classes: Sequence[str], ignore_label: int) -> dict[str, Any]:
    """Count the images with label files, and the pixels of each class.

    Returns:
        ``images``, ``image_sizes``, ``not_counted`` (share of the pixels) and ``classes``: name ->
        ``images`` and ``share`` of the pixels that count.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        pixels = list(pool.map(_count_labels, [record["sem_seg_file_name"] for record in records]))
    total = np.sum(pixels, axis=0)
    counting = total.sum() - total[ignore_label]
    table = {
        name: {
            "images": int(sum(counts[index] > 0 for counts in pixels)),
            "share": float(total[index] / max(counting, 1)),
        }
        for index, name in enumerate(classes)
    }
    return {
        "images": len(records),
        "image_sizes": sizes_of([(record["width"], record["height"]) for record in records]),
        "not_counted": float(total[ignore_label] / max(total.sum(), 1)),
        "classes": table,
    }


def sizes_of(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """``different`` sizes, and by area the ``smallest``, ``median`` and ``largest`` (w, h)."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    places = {"smallest": 0, "median": len(ordered) // 2, "largest": -1}
    found = {name: list(ordered[at]) for name, at in places.items()} if ordered else {}
    return {"different": len(set(sizes)), **found}


def as_text(counts: Mapping[str, Any]) -> str:
    """The counts as a table of the classes and a few lines."""
    objects = "objects" in counts
    table = counts["classes"]
    keys = [key for key in next(iter(table.values()), {}) if key not in RARE or _any(table, key)]
    rows = [[name, *(_cell(key, row[key]) for key in keys)] for name, row in table.items()]
    align = ["left", *["right"] * len(keys)]
    lines = [tabulate(rows, ["class", *keys], "simple", disable_numparse=True, colalign=align)]
    if objects:
        per, sides = counts["objects_per_image"], counts["box_sides"]
        lines.append(
            f"objects in an image  {per['least']} to {per['most']}, median {per['median']:g}, mean "
            f"{per['mean']:.1f}"
        )
        if sides:
            low, middle, high = (f"{sides[str(p)]:.0f}" for p in PERCENTILES)
            lines.append(
                f"sides of the boxes   median {middle} px, 90 % from {low} to {high} px (square "
                "root of the area)"
            )
    else:
        lines.append(f"pixels not counted   {100 * counts['not_counted']:.1f} %")
    lines.append(f"sizes of the images  {sizes_as_text(counts['image_sizes'])}")
    return "\n".join(lines)


def sizes_as_text(sizes: Mapping[str, Any]) -> str:
    """The result of `sizes_of` as a phrase."""
    if sizes["different"] <= 1:
        return f"{'x'.join(map(str, sizes.get('median', ['none'])))}, all of them"
    smallest, median, largest = (
        "x".join(map(str, sizes[name])) for name in ("smallest", "median", "largest")
    )
    return f"{smallest} to {largest}, median {median}, {counted(sizes['different'], 'size', ',')}"


def _any(table: Mapping[str, Mapping[str, float]], key: str) -> bool:
    return any(row[key] for row in table.values())


def _cell(key: str, value: float) -> str:
    return f"{100 * value:.2f} %" if key == "share" else f"{value:,}"


def _count_labels(path: str) -> np.ndarray:
    return np.bincount(read_labels(path).ravel(), minlength=256)[:256]

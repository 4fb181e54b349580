"""A picture of what the network is given: photographs, and beside each its views."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode

from moco_common.files import replace_file
from moco_common.text import counted
from pretrain.data.decoding import decode
from pretrain.data.loader import build_batches
from pretrain.data.source_base import Source
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import ViewRecipe, build_recipes
from pretrain.visualization.contact_sheet import enlarged, fitted, heading, png, sheet

_SIDE = 160  # what smaller views are enlarged to, by whole factors
_VIEWS = {  # what each method calls the views that it looks at; others number them
    "moco": ("query view", "key view"),
    "end-to-end": ("query view", "key view"),
    "memory-bank": ("query view",),  # the keys are those of earlier epochs
    "byol": ("view 1 (T)", "view 2 (T')"),  # either goes through both networks
}


def write_views(cfg: CfgNode, path: str, n: int = 8) -> str:
    """Draw the first samples of the run that ``cfg`` describes; a sentence that says where."""
    source = open_source(cfg.DATA)
    picture = views_picture(
        source, build_recipes(cfg), min(n, len(source)), method=cfg.METHOD, seed=cfg.SEED
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, lambda file: file.write(picture))
    return (
        f"{path}: {min(n, len(source))} of {counted(len(source), 'image')}, each beside its views"
    )


def views_picture(
    source: Source,
    recipes: Sequence[ViewRecipe],
    n: int = 8,
    *,
    method: str = "",
    seed: int = 0,
) -> bytes:
    """The first n samples of a run, one a row: the photograph, then the views, pixel by pixel,
    below a heading with their names and sizes.

    Args:
        recipes: one a view; small views are enlarged by a whole factor.
        method: names the views, and shows only those that it looks at.
        seed: of the run.

    Returns:
        An encoded PNG.

    Raises:
        UserError: the images cannot be read.
    """
    names = view_names(recipes, method)
    recipes = recipes[: len(names)]
    (batch,) = build_batches(
        source, recipes, batch_size=n, seed=seed, stop_step=1, max_bad_share=1.0
    )
    index = batch.index.tolist()
    if source.streamed:
        encoded = first_images(source, n, seed)
    else:
        encoded = {image: source.read(image) for image in index}
    side = max(recipe.crop_size for recipe in recipes)
    side *= -(-_SIDE // side)
    columns = [[fitted(_decoded(encoded[image]), side) for image in index]]
    for views in batch.to("cpu"):
        columns.append([enlarged(v, side) for v in views.permute(0, 2, 3, 1).numpy()])
    sizes = [f"{recipe.crop_size} px" for recipe in recipes]
    headings = ["photograph", *map(", ".join, zip(names, sizes, strict=True))]
    rows = zip(*columns, strict=True)
    return png(sheet([[heading(text, side) for text in headings], *rows]))


def view_names(recipes: Sequence[ViewRecipe], method: str = "") -> list[str]:
    """What the views are called that ``method`` looks at, the first of ``recipes``."""
    if len(recipes) > 2:  # multi-crop
        small = range(1, len(recipes) - 1)
        return ["large crop 1", "large crop 2", *(f"small crop {i}" for i in small)]
    numbered = (f"view {i + 1}" for i in range(len(recipes)))
    return list(_VIEWS.get(method, numbered))


def first_images(source: Source, n: int, seed: int) -> dict[int, bytes | str]:
    """The first n samples of a stream: encoded bytes (or why there are none) by image."""
    positions = np.arange(n)
    images = source.order(positions, n, seed).tolist()
    return dict(zip(images, next(source.stream(iter([positions]), n, seed)), strict=True))


def _decoded(data: bytes | str) -> np.ndarray:
    assert isinstance(data, bytes)  # its views have been made
    return decode(data)

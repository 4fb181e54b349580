"""Contact sheet of the network's input: photographs, each with its views."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode

from moco_common.files import check_output, make_folder, protecting, replace_file
from moco_common.text import counted
from pretrain.data.decoding import decode
from pretrain.data.loader import build_batches
from pretrain.data.source_base import Source
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import ViewRecipe, build_recipes
from pretrain.methods import method_class
from pretrain.visualization.contact_sheet import enlarged, fitted, heading, png, sheet

_SIDE = 160  # side in pixels to which smaller views are enlarged, by a whole factor


def write_views(cfg: CfgNode, path: str, n: int = 8) -> str:
    """Draw the first ``n`` samples of the run that ``cfg`` describes; return a line about it."""
    target = Path(path)
    make_folder(target.parent, "--show-views")
    source = open_source(cfg.DATA)
    files = [part for spec in cfg.DATA for part in spec.split(":")]
    with protecting([*files, *source.files_in(target.parent)]):
        check_output(target)
    picture = views_picture(
        source, build_recipes(cfg), min(n, len(source)), method=cfg.METHOD, seed=cfg.SEED
    )
    replace_file(target, lambda file: file.write(picture))
    return f"{path}: {min(n, len(source))} of {counted(len(source), 'image')}, each with its views"


def views_picture(
    source: Source,
    recipes: Sequence[ViewRecipe],
    n: int = 8,
    *,
    method: str = "",
    seed: int = 0,
) -> bytes:
    """Draw the first n samples of a run, one per row: the photograph and its views, unscaled or
    enlarged by a whole factor, below a heading with their names and sizes.

    Args:
        recipes: one per view.
        method: name of the method whose views are drawn; "" for all views, numbered.
        seed: of the run.

    Returns:
        An encoded PNG.

    Raises:
        UserError: the images cannot be read, or there is no such method.
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
    """Names of the views that ``method`` uses, which are the first of ``recipes``."""
    named = method_class(method).view_names if method else None
    if named is not None:
        return list(named)
    if len(recipes) > 2:  # multi-crop
        small = range(1, len(recipes) - 1)
        return ["large crop 1", "large crop 2", *(f"small crop {i}" for i in small)]
    return [f"view {i + 1}" for i in range(len(recipes))]


def first_images(source: Source, n: int, seed: int) -> dict[int, bytes | str]:
    """Encoded bytes of the first n samples of a stream, or the reason for their lack, by image."""
    positions = np.arange(n)
    images = source.order(positions, n, seed).tolist()
    return dict(zip(images, next(source.stream(iter([positions]), n, seed)), strict=True))


def _decoded(data: bytes | str) -> np.ndarray:
    assert isinstance(data, bytes)  # its views were rendered
    return decode(data)

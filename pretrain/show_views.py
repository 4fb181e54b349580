"""A picture of what the network is given: photographs, and beside each its views."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode

from pretrain.cells import enlarged, fitted, png, sheet
from pretrain.decoding import decode
from pretrain.files import replace_file
from pretrain.image_source import Source
from pretrain.loader import build_batches
from pretrain.sources import open_source
from pretrain.views import ViewRecipe, build_recipes
from pretrain.wording import counted

_SIDE = 160  # what smaller views are enlarged to, by whole factors


def write_views(cfg: CfgNode, path: str, n: int = 8) -> str:
    """Draw the first samples of the run that ``cfg`` describes; a sentence that says where."""
    source = open_source(cfg.DATA)
    picture = views_picture(source, build_recipes(cfg), min(n, len(source)), seed=cfg.SEED)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, lambda file: file.write(picture))
    return (
        f"{path}: {min(n, len(source))} of {counted(len(source), 'image')}, each beside its views"
    )


def views_picture(
    source: Source, recipes: Sequence[ViewRecipe], n: int = 8, *, seed: int = 0
) -> bytes:
    """The first n samples of a run, one a row: the photograph, then the views, pixel by pixel.

    Args:
        recipes: one a view; small views are enlarged by a whole factor.
        seed: of the run.

    Returns:
        An encoded PNG.

    Raises:
        UserError: the images cannot be read.
    """
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
    return png(sheet(list(zip(*columns, strict=True))))


def first_images(source: Source, n: int, seed: int) -> dict[int, bytes | str]:
    """The first n samples of a stream: encoded bytes (or why there are none) by image."""
    positions = np.arange(n)
    images = source.order(positions, n, seed).tolist()
    return dict(zip(images, next(source.stream(iter([positions]), n, seed)), strict=True))


def _decoded(data: bytes | str) -> np.ndarray:
    assert isinstance(data, bytes)  # its views have been made
    return decode(data)

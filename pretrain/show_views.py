"""A picture of what the network is given: photographs, and beside each its views."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from fvcore.common.config import CfgNode

from pretrain.decoding import decode
from pretrain.files import replace_file
from pretrain.loader import build_batches
from pretrain.sources import Source, open_source
from pretrain.views import ViewRecipe, build_recipes

_GAP = 4  # pixels between the cells
_SIDE = 160  # what smaller views are enlarged to, by whole factors


def write_views(cfg: CfgNode, path: str, n: int = 8) -> str:
    """Draw the first samples of the run that ``cfg`` describes; a sentence that says where."""
    source = open_source(cfg.DATA)
    picture = views_picture(source, build_recipes(cfg), min(n, len(source)), seed=cfg.SEED)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, lambda file: file.write(picture))
    return f"{path}: {min(n, len(source))} of {len(source)} images, each beside its views"


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
        positions = np.arange(n)
        images = source.order(positions, n, seed).tolist()
        encoded = dict(zip(images, next(source.stream(iter([positions]), n, seed)), strict=True))
    else:
        encoded = {image: source.read(image) for image in index}
    side = max(recipe.crop_size for recipe in recipes)
    side *= -(-_SIDE // side)
    columns = [[_photograph(encoded[image], side) for image in index]]
    for views in batch.to("cpu"):
        columns.append([_view(v, side) for v in views.permute(0, 2, 3, 1).numpy()])
    rows = [np.concatenate(row, axis=1) for row in zip(*columns, strict=True)]
    picture = np.concatenate(rows)[:-_GAP, :-_GAP]
    _, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return png.tobytes()


def _photograph(data: bytes | str, side: int) -> np.ndarray:
    """The photograph within a cell."""
    assert isinstance(data, bytes)  # its views have been made
    image = decode(data)
    height, width, _ = image.shape
    scale = side / max(height, width)
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    return _cell(cv2.resize(image, shape, interpolation=cv2.INTER_AREA), side)


def _view(view: np.ndarray, side: int) -> np.ndarray:
    factor = max(1, side // len(view))
    return _cell(view.repeat(factor, axis=0).repeat(factor, axis=1), side)


def _cell(image: np.ndarray, side: int) -> np.ndarray:
    """On white, in the centre, with the gap to the right and below."""
    cell = np.full((side + _GAP, side + _GAP, 3), 255, np.uint8)
    height, width, _ = image.shape
    top, left = (side - height) // 2, (side - width) // 2
    cell[top : top + height, left : left + width] = image
    return cell

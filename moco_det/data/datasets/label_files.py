"""Label files of semantic segmentation."""

from pathlib import Path

import numpy as np

from moco_common.errors import UserError
from moco_common.images import DecodeError, open_picture


def read_labels(path: str | Path) -> np.ndarray:
    """Read the (H, W) labels of a PNG: grey values or, as in VOC's files, palette indices.

    Raises:
        UserError: the file cannot be read, or holds colours instead of labels.
    """
    try:
        with open_picture(path, deep=True) as image:
            if image.mode not in ("L", "P", "I", "I;16"):
                raise UserError(
                    f"{path} has the mode {image.mode}, so it holds no labels: write one grey "
                    "value or palette index per pixel."
                )
            return np.array(image, dtype=np.int64)
    except (OSError, DecodeError) as error:
        raise UserError(f"cannot read the labels {path}: {error}.") from error

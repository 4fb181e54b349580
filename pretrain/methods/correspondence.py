"""Which cells of two feature maps show the same part of an image: by where the views lie in it, or
by how alike the features are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cell_centres(places: Tensor, rows: int, columns: int) -> Tensor:
    """Return x and y of the centre of each cell of a view's feature map, as fractions of the image.

    Args:
        places: (N, 5) left, top, right and bottom of each view as fractions of its image, and 1
            where it is flipped.

    Shape: (N, 5) -> (N, rows * columns, 2), row by row.
    """
    left, top, right, bottom, flip = places[:, :, None].unbind(1)  # Nx1 each
    x = _fractions(columns, places)
    x = left + torch.where(flip > 0.5, 1 - x, x) * (right - left)  # Nxcolumns
    y = top + _fractions(rows, places) * (bottom - top)  # Nxrows
    shape = (len(places), rows, columns)
    return torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], 3).flatten(1, 2)


def cell_diagonal(places: Tensor, rows: int, columns: int) -> Tensor:
    """Return the diagonal of a cell in fractions of the image. Shape: (N, 5) -> (N,)."""
    width = (places[:, 2] - places[:, 0]) / columns
    return torch.hypot(width, (places[:, 3] - places[:, 1]) / rows)


def _fractions(cells: int, like: Tensor) -> Tensor:
    """Centres of ``cells`` equal parts of [0, 1]."""
    return (torch.arange(cells, device=like.device, dtype=like.dtype) + 0.5) / cells


def most_similar(features: Tensor, others: Tensor) -> Tensor:
    """Return, for each cell of one feature map, the cell of the other with the largest cosine.

    Shape: (N, C, P), (N, C, Q) -> (N, P), int64 in [0, Q).
    """
    cosines = F.normalize(features, dim=1).transpose(1, 2) @ F.normalize(others, dim=1)  # NxPxQ
    return cosines.argmax(2)

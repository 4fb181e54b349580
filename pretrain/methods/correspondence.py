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


def nearby(places: Tensor, others: Tensor, rows: int, columns: int, threshold: float) -> Tensor:
    """Return which cells of two views of an image are close to each other: those whose centres are
    less than ``threshold`` times the diagonal of the larger view's cells apart (Xie et al. 2021,
    PixPro, Eq. 1). As in the authors' code, distances are in fractions of the image's sides.

    Shape: (N, 5), (N, 5) -> (N, P, P), bool, with P = rows * columns.
    """
    centres, other_centres = (cell_centres(x, rows, columns) for x in (places, others))  # NxPx2
    distance = torch.linalg.vector_norm(centres[:, :, None] - other_centres[:, None], dim=3)
    diagonal = cell_diagonal(places, rows, columns).maximum(cell_diagonal(others, rows, columns))
    close: Tensor = distance < threshold * diagonal[:, None, None]
    return close


def overlap(places: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the region that two views of each image share, (N, 4): left, top, right and bottom in
    fractions of the image, and whether there is one, (N,). Shape: (N, 5), (N, 5)."""
    top_left = places[:, :2].maximum(others[:, :2])
    bottom_right = places[:, 2:4].minimum(others[:, 2:4])
    return torch.cat([top_left, bottom_right], 1), (top_left < bottom_right).all(1)


def resample(maps: Tensor, places: Tensor, region: Tensor) -> Tensor:
    """Sample maps of views at the cells of a region of the image, bilinearly, as RoIAlign with one
    sample per cell: the crop and the flip of the view are undone.

    Args:
        places: (N, 5) where the views lie.
        region: (N, 4) left, top, right and bottom in fractions of the image.

    Shape: (N, K, h, w) -> (N, K, h, w).
    """
    rows, columns = maps.shape[2:]
    places, region = places.to(maps.dtype), region.to(maps.dtype)
    left, top, right, bottom, flip = places[:, :, None].unbind(1)  # Nx1 each
    first_x, first_y, last_x, last_y = region[:, :, None].unbind(1)
    x = (first_x + _fractions(columns, maps) * (last_x - first_x) - left) / (right - left)
    y = (first_y + _fractions(rows, maps) * (last_y - first_y) - top) / (bottom - top)
    across = _bilinear(torch.where(flip > 0.5, 1 - x, x), columns)  # Nxwxw
    down = _bilinear(y, rows)  # Nxhxh
    return torch.einsum("niy,nkyx,njx->nkij", down, maps, across)


def _bilinear(fractions: Tensor, cells: int) -> Tensor:
    """Weights of the cells at these fractions of a view's side. Shape: (N, P) -> (N, P, cells)."""
    position = (fractions * cells - 0.5).clamp(0, cells - 1)  # the first cell's centre is 0
    cell = torch.arange(cells, device=fractions.device, dtype=fractions.dtype)
    return (1 - (position[:, :, None] - cell).abs()).clamp(min=0)


def _fractions(cells: int, like: Tensor) -> Tensor:
    """Centres of ``cells`` equal parts of [0, 1]."""
    return (torch.arange(cells, device=like.device, dtype=like.dtype) + 0.5) / cells


def most_similar(features: Tensor, others: Tensor) -> Tensor:
    """Return, for each cell of one feature map, the cell of the other with the largest cosine.

    Shape: (N, C, P), (N, C, Q) -> (N, P), int64 in [0, Q).
    """
    cosines = F.normalize(features, dim=1).transpose(1, 2) @ F.normalize(others, dim=1)  # NxPxQ
    return cosines.argmax(2)

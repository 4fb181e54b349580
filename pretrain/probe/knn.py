"""Weighted k-nearest-neighbour classification of frozen features.

Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", section 3.4, whose k = 200 and T = 0.07 are the defaults.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.probe.defaults import TEMPERATURE, K


@torch.no_grad()
def weighted_knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    num_classes: int,
    k: int = K,
    temperature: float = TEMPERATURE,
    top: int = 5,
    device: torch.device | None = None,
    query_chunk: int = 1024,
    bank_chunk: int = 32768,
) -> Tensor:
    """Classify by the k most similar training images, each voting with weight exp(cosine / T).

    Memory stays below query_chunk * (bank_chunk + 4 k + num_classes) floats for any N and M; the
    features may be memory-mapped.

    Args:
        train, test: (N, C) and (M, C) float features, not normalised.
        train_labels: (N,) int64, in [0, num_classes).
        k: number of neighbours, at most N of which are used.
        temperature: T.
        top: number of classes to predict per image, at most num_classes.
        device: device for the computation; default: that of ``test``.

    Returns:
        int64 (M, min(top, num_classes)), on the CPU: the classes in order of falling votes, padded
        with -1 if fewer classes have any.
    """
    predictions = []
    for queries in test.split(query_chunk):
        near = nearest(train, train_labels, queries.to(device or test.device), k, bank_chunk)
        predictions.append(vote(*near, num_classes, temperature, top).cpu())
    return torch.cat(predictions)


def nearest(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, chunk: int = 32768
) -> tuple[Tensor, Tensor]:
    """Return the cosine and the label of the k rows of ``bank`` nearest to each query.

    Args:
        bank, labels: (N, C) float and (N,) int64, on any device; rows labelled -1 are ignored.
        queries: (Q, C) float, on the device of the computation.

    Returns:
        Cosines, (Q, min(k, N)) float, in falling order, -inf where the bank has no more rows; and
        labels, (Q, min(k, N)) int64.
    """
    q = F.normalize(queries, dim=1)  # QxC
    best, found = q.new_empty(len(q), 0), labels.new_empty(len(q), 0).to(q.device)
    for rows, classes in zip(bank.split(chunk), labels.split(chunk), strict=True):
        classes = classes.to(q.device)
        similarity = q @ F.normalize(rows.to(q.device), dim=1).T  # QxB
        similarity = similarity.masked_fill(classes < 0, -torch.inf)
        similarity, at = similarity.topk(min(k, len(rows)), dim=1)
        best, found = merge(torch.cat([best, similarity], 1), torch.cat([found, classes[at]], 1), k)
    return best, found


def merge(similarity: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k most similar of J candidates per query; both inputs are (Q, J)."""
    similarity, at = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return similarity, labels.gather(1, at)


def vote(
    similarity: Tensor, labels: Tensor, num_classes: int, temperature: float, top: int
) -> Tensor:
    """Rank the classes by the sum of exp(similarity / T) over the neighbours: int64 (Q, top)."""
    # Similarities relative to the nearest give the same ranking without overflow at a small T.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # QxK, 0 at -inf
    votes = weights.new_zeros(len(weights), num_classes)
    votes.scatter_add_(1, labels.clamp_min(0), weights)
    best, classes = votes.topk(min(top, num_classes), dim=1)
    return classes.masked_fill(best == 0, -1)

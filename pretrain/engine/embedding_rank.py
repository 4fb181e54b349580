"""RankMe: how many dimensions the embeddings of a run use (Garrido et al. 2023, "RankMe: Assessing
the Downstream Performance of Pretrained Self-Supervised Representations by Their Rank")."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of singular values relative to their sum; 0 if all are 0."""
    total = singular.sum()
    if total <= 0:
        return 0.0
    return float(torch.special.entr(singular / total).sum().exp())


def rank_me(embeddings: Tensor) -> float:
    """Return the RankMe of (N, C) embeddings, scaled to length 1: from 1 to min(N, C).

    The singular values are the square roots of the eigenvalues of the smaller Gram matrix, in
    float64; those below its rounding error count as 0.
    """
    x = F.normalize(embeddings.detach().double(), dim=1)
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    eigenvalues = torch.linalg.eigvalsh(gram)  # rising
    error = eigenvalues[-1] * len(gram) * torch.finfo(torch.float64).eps
    return effective_rank(torch.where(eigenvalues > error, eigenvalues, 0.0).sqrt())


class RecentEmbeddings:
    """The last embeddings that an encoder has computed in training, for `rank_me`.

    Args:
        encoder: its output is (N, C), or a tuple that begins with (N, C) embeddings or a map of
            them, (N, C, h, w), which is averaged. It is only observed: the run stays the same bit
            for bit.
        most: number of embeddings that are kept.
    """

    def __init__(self, encoder: nn.Module, most: int = 1024) -> None:
        self._most = most
        self._batches: deque[Tensor] = deque()
        encoder.register_forward_hook(self._keep)

    def _keep(self, encoder: nn.Module, inputs: Any, outputs: Tensor | tuple[Tensor, ...]) -> None:
        if encoder.training:
            output = outputs if isinstance(outputs, Tensor) else outputs[0]
            output = output.flatten(2).mean(2) if output.dim() > 2 else output
            self._batches.append(output.detach())
            while len(self._batches) * len(output) >= self._most + len(output):
                self._batches.popleft()

    def rank(self) -> float | None:
        """Return the RankMe of the last embeddings of this rank; None before the first."""
        return rank_me(torch.cat(list(self._batches))) if self._batches else None

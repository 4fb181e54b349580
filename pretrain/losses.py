"""Losses: pure functions of tensors. No state, no collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    q: Tensor, k: Tensor, negatives: Tensor, temperature: float, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """InfoNCE with one positive a query and shared negatives (He et al. 2020, Eq. 1).

    For each query, ``-log( exp(q.k/T) / (exp(q.k/T) + sum_j exp(q.n_j/T)) )``; the mean over
    queries is returned. The negatives are visited in chunks by an online softmax and the gradient
    is computed on the way, so neither the NxK logits nor the negatives are kept for the backward
    pass: the caller may overwrite its queue at once.

    Args:
        q: (N, C) queries, of unit length for cosine similarity; receives a gradient.
        k: (N, C) positive keys; receives a gradient if it requires one.
        negatives: (K, C) keys of other images; never receives a gradient.
        temperature: T > 0.
        chunk: negatives visited at once; changes rounding only.

    Returns:
        loss: scalar, log(K+1) when all similarities are equal.
        correct: (N,) bool, whether the positive is more similar than every negative.
    """
    loss, correct = _InfoNCE.apply(q, k, negatives, temperature, chunk)
    return loss, correct


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, negatives: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        scaled = q / temperature
        positive = (scaled * k).sum(1)  # N
        # Running maximum, sum of exp(logit - maximum), and sum of exp(logit - maximum) * key.
        # They start at the positive, so the softmax includes it.
        maximum = positive.clone()
        total = torch.ones_like(positive)  # N
        expected = k.clone()  # NxC
        hardest = torch.full_like(positive, -torch.inf)
        for keys in negatives.split(chunk):
            logits = scaled @ keys.T  # Nxchunk
            highest = logits.amax(1)
            hardest = torch.maximum(hardest, highest)
            new_maximum = torch.maximum(maximum, highest)
            shrink = (maximum - new_maximum).exp_()
            weights = logits.sub_(new_maximum[:, None]).exp_()  # Nxchunk
            total.mul_(shrink).add_(weights.sum(1))
            expected.mul_(shrink[:, None]).addmm_(weights, keys)
            maximum = new_maximum
        loss = (maximum + total.log() - positive).mean()
        scale = 1.0 / (temperature * len(q))
        grad_q = (expected / total[:, None] - k) * scale  # NxC
        probability = (positive - maximum).exp_() / total  # N, of the positive
        grad_k = (probability - 1.0)[:, None] * q * scale if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(grad_q, grad_k)
        correct = positive > hardest
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_q, grad_k = ctx.saved_tensors
        return (
            grad_loss * grad_q,
            None if grad_k is None else grad_loss * grad_k,
            None,
            None,
            None,
        )


def batch_info_nce(
    q: Tensor, keys: Tensor, positive: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each query against all keys of a batch, one of which is its positive (He et al.
    2020, Eq. 1, with the batch for a dictionary).

    For each query, ``-log( exp(q.k+/T) / sum_j exp(q.k_j/T) )``; the mean over the queries.

    Args:
        q: (N, C) queries, of unit length for cosine similarity.
        keys: (M, C) keys.
        positive: (N,) int64, which key belongs to each query.
        temperature: T > 0.

    Returns:
        loss: scalar, log(M) when all similarities are equal.
        correct: (N,) bool, whether the positive is the most similar key.
    """
    logits = q @ keys.T / temperature  # NxM
    return F.cross_entropy(logits, positive), logits.argmax(1) == positive


def nt_xent(z: Tensor, everyone: Tensor, first: int, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent (Chen et al. 2020, SimCLR, Eq. 1): each embedding against all others but itself, of
    which the other view of its image is the positive.

    Args:
        z: (2N, C) unit vectors: N images in one view, then the same N in the other.
        everyone: (M, C) all embeddings of the global batch; rows ``first`` to ``first + 2N - 1``
            are ``z``.
        first: see above.
        temperature: T > 0.

    Returns:
        loss: scalar, log(M-1) when all similarities are equal.
        correct: (2N,) bool, whether the positive is the most similar one.
    """
    own = torch.arange(len(z), device=z.device)
    positive = first + own.roll(len(z) // 2)  # row i and row i + N show the same image
    logits = z @ everyone.T / temperature  # 2NxM
    logits = logits.index_put((own, first + own), logits.new_tensor(-torch.inf))
    return F.cross_entropy(logits, positive), logits.argmax(1) == positive


def cosine_regression(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of the vectors scaled to unit length, ``2 - 2 cos`` (Grill et al. 2020,
    BYOL, Eq. 2).

    Shape: (N, C), (N, C) -> (), in [0, 4]; the target receives a gradient if it requires one.
    """
    return (F.normalize(prediction, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean()


def log_sum_exp(q: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What a part of the negatives adds to the denominator of InfoNCE, and the largest logit.

    Shape: (N, C), (K, C) -> (N,) with gradient, (N,) without; both -inf for K = 0.
    """
    logits = q @ negatives.T / temperature  # NxK
    floor = logits.new_full((len(q), 1), -torch.inf)
    return logits.logsumexp(1), torch.cat([floor, logits.detach()], 1).amax(1)


def identity(x: Tensor) -> Tensor:
    """What it is given: the sum over the ranks where there is one."""
    return x


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    epsilon: float,
    iterations: int = 3,
    sum_over_ranks: Callable[[Tensor], Tensor] = identity,
) -> Tensor:
    """Codes that spread the batch equally over the prototypes (Caron et al. 2020, SwAV, Eq. 3-5).

    The scores, as ``exp(scores / epsilon)``, are scaled in turn so that all prototypes receive the
    same share of the global batch, and so that each sample gives 1. No gradient passes.

    Args:
        scores: (..., N, P) cosines of N samples of this rank and P prototypes. Leading dimensions
            are problems of their own, which share each exchange between the ranks.
        epsilon: smoothness, at least 0.025: below that the exponentials leave float32's range.
        iterations: of both scalings, the samples' last.
        sum_over_ranks: adds up a tensor (..., 1, P) over the ranks; N may differ between them.

    Returns:
        (..., N, P), each row a distribution over the prototypes.
    """
    # A common factor changes nothing; with this one no exponential exceeds 1.
    codes = ((scores - 1.0) / epsilon).exp()
    for _ in range(iterations):
        codes /= sum_over_ranks(codes.sum(-2, keepdim=True))  # prototypes: 1 each
        codes /= codes.sum(-1, keepdim=True)  # samples: 1 each
    return codes


def swapped_prediction(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between the code of one view and what the others predict (Caron et al. 2020,
    SwAV, Eq. 2 and 6): the mean over samples and over all pairs of a coded view and another view.

    Args:
        scores: (V, N, P) cosines with the prototypes, all views.
        codes: (A, N, P) codes of the first A <= V views.
        temperature: T > 0.

    Returns:
        scalar, log(P) when all scores are equal.
    """
    log_p = F.log_softmax(scores / temperature, dim=2)  # VxNxP
    cross = -torch.einsum("anp,vnp->av", codes, log_p) / scores.shape[1]  # AxV
    other = ~torch.eye(*cross.shape, dtype=torch.bool, device=cross.device)
    return cross[other].mean()

"""Losses as pure functions of tensors, without state or collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    q: Tensor, k: Tensor, negatives: Tensor, temperature: float, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """InfoNCE with one positive per query and shared negatives (He et al. 2020, Eq. 1).

    The mean over queries of ``-log( exp(q.k/T) / (exp(q.k/T) + sum_j exp(q.n_j/T)) )``. An online
    softmax visits the negatives in chunks and computes the gradient at the same time, so neither
    the NxK logits nor the negatives are kept for the backward pass, and the caller may overwrite
    its queue at once.

    Args:
        q: (N, C) queries, of unit length for cosine similarity; receives a gradient.
        k: (N, C) positive keys; receives a gradient if it requires one.
        negatives: (K, C) keys of other images; never receives a gradient.
        temperature: T > 0.
        chunk: negatives visited at once; it affects rounding only.

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
        # They start with the positive, so that the softmax includes it.
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
    2020, Eq. 1, with the batch as the dictionary).

    The mean over queries of ``-log( exp(q.k+/T) / sum_j exp(q.k_j/T) )``.

    Args:
        q: (N, C) queries, of unit length for cosine similarity.
        keys: (M, C) keys.
        positive: (N,) int64, the key of each query.
        temperature: T > 0.

    Returns:
        loss: scalar, log(M) when all similarities are equal.
        correct: (N,) bool, whether the positive is the most similar key.
    """
    logits = q @ keys.T / temperature  # NxM
    return F.cross_entropy(logits, positive), logits.argmax(1) == positive


def nt_xent(z: Tensor, everyone: Tensor, first: int, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent (Chen et al. 2020, SimCLR, Eq. 1): each embedding against all others, of which the
    other view of its image is the positive.

    Args:
        z: (2N, C) unit vectors: one view of N images, then the other view of the same images.
        everyone: (M, C) all embeddings of the global batch, of which rows ``first`` to
            ``first + 2N - 1`` are ``z``.
        first: row of ``everyone`` at which ``z`` starts.
        temperature: T > 0.

    Returns:
        loss: scalar, log(M-1) when all similarities are equal.
        correct: (2N,) bool, whether the positive is the most similar one.
    """
    own = torch.arange(len(z), device=z.device)
    positive = first + own.roll(len(z) // 2)  # row i and row i + N show the same image
    logits = z @ everyone.T / temperature  # 2NxM
    logits = logits.index_put((own, first + own), logits.new_full((), -torch.inf))
    return F.cross_entropy(logits, positive), logits.argmax(1) == positive


def cosine_regression(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance between vectors scaled to unit length, ``2 - 2 cos`` (Grill et al.
    2020, BYOL, Eq. 2).

    Shape: (N, C), (N, C) -> (), in [0, 4]; the target receives a gradient if it requires one.
    """
    return (F.normalize(prediction, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean()


def pixel_consistency(prediction: Tensor, target: Tensor, positive: Tensor) -> Tensor:
    """Mean of ``2 - 2 cos`` over the positive pairs of cells of each image, and over the images
    (Xie et al. 2021, PixPro, Eq. 4, shifted and doubled as BYOL's loss is). An image without such a
    pair counts as 0.

    Shape: (N, C, P), (N, C, Q), (N, P, Q) bool -> (), in [0, 4].
    """
    cosines = F.normalize(prediction, dim=1).transpose(1, 2) @ F.normalize(target, dim=1)  # NxPxQ
    pairs = positive.sum((1, 2))  # N
    total = torch.where(positive, 2 - 2 * cosines, 0.0).sum((1, 2))  # N
    return (total / pairs.clamp(min=1)).mean()


def propagate(x: Tensor, values: Tensor, sharpness: float) -> Tensor:
    """Smooth a map by itself: each cell is the sum of the values of all cells, weighted by
    ``max(cos, 0) ** sharpness`` of the features (Xie et al. 2021, PixPro, Eq. 2 and 3).

    Shape: (N, C, P), (N, D, P) -> (N, D, P).
    """
    x = F.normalize(x, dim=1)
    similarity = (x.transpose(1, 2) @ x).relu() ** sharpness  # NxPxP
    return values @ similarity


def assignment_distillation(
    student: Tensor, teacher: Tensor, centre: Tensor, student_t: float, teacher_t: float
) -> Tensor:
    """Cross-entropy of the student's assignment of each cell to the slots with the teacher's,
    centred one (Wen et al. 2022, SlotCon, Eq. 2 and 3): the mean over the cells of each image.

    Args:
        student, teacher: (N, K, ...) cosines between the cells and the slots.
        centre: (K,) running mean of the teacher's cosines.
        student_t, teacher_t: temperatures, above 0.

    Returns:
        (N,), log(K) when all slots look alike.
    """
    wanted = ((teacher.flatten(2) - centre[:, None]) / teacher_t).softmax(1)  # NxKxP
    log_p = (student.flatten(2) / student_t).log_softmax(1)
    return -(wanted * log_p).sum(1).mean(1)


def slot_means(x: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Average the cells of a map for each slot, weighted by the softmax over the slots of the
    cosines (Wen et al. 2022, SlotCon, Eq. 5).

    Shape: (N, C, ...), (N, K, ...) -> (N, K, C).
    """
    attention = (scores.flatten(2) / temperature).softmax(1) + 1e-6  # NxKxP
    attention = attention / attention.sum(2, keepdim=True)
    return attention @ x.flatten(2).transpose(1, 2)


def log_sum_exp(
    q: Tensor, negatives: Tensor, temperature: float, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logarithm of the contribution of some negatives to the denominator of InfoNCE, and the
    largest logit.

    Args:
        counted: (K,) bool, False for the negatives to leave out; None for all of them.

    Shape: (N, C), (K, C) -> (N,) with gradient, (N,) without; both are -inf without negatives.
    """
    logits = q @ negatives.T / temperature  # NxK
    if counted is not None:
        logits = logits.masked_fill_(~counted, -torch.inf)
    floor = logits.new_full((len(q), 1), -torch.inf)
    return logits.logsumexp(1), torch.cat([floor, logits.detach()], 1).amax(1)


def noise_rejected(
    q: Tensor,
    negatives: Tensor,
    temperature: float,
    offset: Tensor,
    counted: Tensor | None = None,
) -> Tensor:
    """Contribution of some negatives to the loss of noise-contrastive estimation (Wu et al. 2018,
    Eq. 7): the sum of ``-log(1 - h)``, where ``h = sigmoid(q.n/T - offset)`` is the probability
    that a negative is taken for the query's own image.

    Args:
        counted: (K,) bool, False for the negatives to leave out; None for all of them.

    Shape: (N, C), (K, C), () -> (N,); 0 without negatives.
    """
    terms = F.softplus(q @ negatives.T / temperature - offset)  # NxK
    return (terms if counted is None else torch.where(counted, terms, 0)).sum(1)


def identity(x: Tensor) -> Tensor:
    """Return ``x``: the sum over the ranks when there is only one."""
    return x


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    epsilon: float,
    iterations: int = 3,
    sum_over_ranks: Callable[[Tensor], Tensor] = identity,
) -> Tensor:
    """Compute codes that distribute the batch evenly over the prototypes (Caron et al. 2020, SwAV,
    Eq. 3-5).

    ``exp(scores / epsilon)`` is scaled alternately so that all prototypes receive the same share of
    the global batch, and so that each sample sums to 1. The result has no gradient.

    Args:
        scores: (..., N, P) cosines between N samples of this rank and P prototypes. Leading
            dimensions are independent problems that share each exchange between the ranks.
        epsilon: smoothness, at least 0.025: below it the exponentials leave the range of float32.
        iterations: of both scalings, that of the samples last.
        sum_over_ranks: sums a tensor (..., 1, P) over the ranks; N may differ between them.

    Returns:
        (..., N, P), each row a distribution over the prototypes.
    """
    # A common factor cancels; with this one no exponential exceeds 1.
    codes = ((scores - 1.0) / epsilon).exp()
    for _ in range(iterations):
        codes /= sum_over_ranks(codes.sum(-2, keepdim=True))  # prototypes: 1 each
        codes /= codes.sum(-1, keepdim=True)  # samples: 1 each
    return codes


def swapped_prediction(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between the codes of some views and the predictions of the others (Caron et al.
    2020, SwAV, Eq. 2 and 6): the mean over samples and over all pairs of a coded and another view.

    Args:
        scores: (V, N, P) cosines between all views and the prototypes.
        codes: (A, N, P) codes of the first A <= V views.
        temperature: T > 0.

    Returns:
        scalar, log(P) when all scores are equal.
    """
    log_p = F.log_softmax(scores / temperature, dim=2)  # VxNxP
    cross = -torch.einsum("anp,vnp->av", codes, log_p) / scores.shape[1]  # AxV
    coded = torch.arange(len(codes), device=cross.device)[:, None]  # Ax1
    others = torch.arange(len(scores) - 1, device=cross.device)  # V-1
    # All columns but the diagonal, by index: a mask would wait for the device to count them.
    return cross.gather(1, others + (others >= coded)).mean()

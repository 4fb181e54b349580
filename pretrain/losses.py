"""Losses: pure functions of tensors. No state, no collectives."""

from __future__ import annotations

from typing import Any

import torch
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

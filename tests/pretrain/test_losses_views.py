"""Losses between views against the papers' formulas as loops, and against lightly on the same
tensors: values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn

from pretrain.losses import (
    batch_info_nce,
    cosine_regression,
    log_sum_exp,
    nt_xent,
    sinkhorn,
    swapped_prediction,
)

T = 0.2


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


def value_and_gradients(function, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_equal(function, oracle, *tensors):
    torch.testing.assert_close(
        value_and_gradients(function, *tensors), value_and_gradients(oracle, *tensors)
    )


def with_bank(keys):
    """lightly's InfoNCE against these negatives. It scales its inputs to unit length."""
    loss = NTXentLoss(T, memory_bank_size=tuple(keys.shape))
    loss.memory_bank.bank = keys.clone()
    return loss


def test_batch_info_nce_is_the_formula_and_lightlys():
    positive = torch.tensor([4, 0, 2])

    def naive(q, keys):
        total = 0.0
        for i in range(3):
            exponentials = [torch.exp(q[i] @ key / T) for key in keys]
            total = total - torch.log(exponentials[positive[i]] / sum(exponentials))
        return total / 3

    q, keys = unit(3, 5), unit(6, 5, seed=1)
    assert_equal(lambda q, k: batch_info_nce(q, k, positive, T)[0], naive, q, keys)

    def lightlys(q):
        """A query at a time: the other keys lie in its bank, which takes no gradient."""
        parts = []
        for row, at in zip(q.split(1), positive.tolist(), strict=True):
            others = keys[torch.arange(6) != at]
            parts.append(with_bank(others)(row, keys[at : at + 1]))
        return torch.stack(parts).mean()

    assert_equal(
        lambda q: batch_info_nce(F.normalize(q, dim=1), keys, positive, T)[0],
        lightlys,
        random(3, 5),
    )
    correct = batch_info_nce(torch.eye(3), torch.eye(3)[[1, 0, 2]], torch.tensor([1, 1, 2]), T)[1]
    assert correct.tolist() == [True, False, True]


def test_nt_xent_is_the_formula_and_lightlys():
    def naive(a, b):
        z = torch.cat([a, b])
        total = 0.0
        for i in range(8):
            others = sum(torch.exp(z[i] @ z[k] / T) for k in range(8) if k != i)
            total = total - torch.log(torch.exp(z[i] @ z[(i + 4) % 8] / T) / others)
        return total / 8

    def ours(a, b):
        z = torch.cat([a, b])
        return nt_xent(z, z, 0, T)[0]

    a, b = unit(4, 5), unit(4, 5, seed=1)
    assert_equal(ours, naive, a, b)
    # lightly scales its inputs to unit length, so unscaled ones test that gradient as well.
    a, b = random(4, 5), random(4, 5, seed=1)
    assert_equal(
        lambda a, b: ours(F.normalize(a, dim=1), F.normalize(b, dim=1)), NTXentLoss(T), a, b
    )


def test_nt_xent_marks_embeddings_whose_other_view_beats_every_other_embedding():
    a, b = unit(6, 3), unit(6, 3, seed=1)
    z = torch.cat([a, b])
    expected = []
    for i in range(12):
        similarities = {k: float(z[i] @ z[k]) for k in range(12) if k != i}
        expected.append(max(similarities, key=similarities.get) == (i + 6) % 12)
    assert 0 < sum(expected) < 12
    assert nt_xent(z, z, 0, T)[1].tolist() == expected


def test_nt_xent_of_a_share_of_the_batch_is_its_part_of_the_whole():
    shares = [torch.cat([unit(2, 5, seed=s), unit(2, 5, seed=9 + s)]) for s in range(3)]
    everyone = torch.cat(shares)
    parts = [nt_xent(share, everyone, 4 * r, T)[0] for r, share in enumerate(shares)]
    a = torch.cat([share[:2] for share in shares])
    b = torch.cat([share[2:] for share in shares])
    z = torch.cat([a, b])
    torch.testing.assert_close(torch.stack(parts).mean(), nt_xent(z, z, 0, T)[0])


def test_cosine_regression_is_the_formula_and_lightlys():
    def naive(p, z):
        total = 0.0
        for i in range(4):
            total = total + 2 - 2 * (p[i] @ z[i]) / (p[i].norm() * z[i].norm())
        return total / 4

    p, z = random(4, 5), random(4, 5, seed=1)
    assert_equal(cosine_regression, naive, p, z)
    assert_equal(cosine_regression, lambda p, z: 2 + 2 * NegativeCosineSimilarity()(p, z), p, z)


def test_parts_of_the_denominator_add_up_to_info_nce_and_lightlys():
    q, k, negatives = unit(3, 5), unit(3, 5, seed=1), unit(7, 5, seed=2)

    def in_parts(q, k):
        parts = [
            log_sum_exp(q, part, T)[0] for part in (negatives[:5], negatives[:0], negatives[5:])
        ]
        return F.softplus(torch.stack(parts).logsumexp(0) - (q * k).sum(1) / T).mean()

    def naive(q, k):
        total = 0.0
        for i in range(3):
            positive = torch.exp(q[i] @ k[i] / T)
            total = total - torch.log(positive / (positive + sum(torch.exp(negatives @ q[i] / T))))
        return total / 3

    assert_equal(in_parts, naive, q, k)
    assert_equal(
        lambda q, k: in_parts(F.normalize(q, dim=1), F.normalize(k, dim=1)),
        with_bank(negatives),
        random(3, 5),
        random(3, 5, seed=1),
    )
    hardest = log_sum_exp(q, negatives, T)[1]
    torch.testing.assert_close(hardest, torch.stack([(negatives @ row).max() / T for row in q]))
    assert log_sum_exp(q, negatives[:0], T)[1].tolist() == [-math.inf] * 3


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_the_loops_and_lightlys(iterations):
    scores = unit(2, 6, 4, seed=3)  # two problems, six samples, four prototypes
    codes = sinkhorn(scores, 0.05, iterations)
    for problem, result in zip(scores, codes, strict=True):
        q = torch.exp(problem / 0.05)
        q = q / q.sum()
        for _ in range(iterations):
            for p in range(4):
                q[:, p] = q[:, p] / q[:, p].sum() / 4
            for n in range(6):
                q[n] = q[n] / q[n].sum() / 6
        torch.testing.assert_close(result, 6 * q)
        torch.testing.assert_close(result, lightly_sinkhorn(problem, iterations, 0.05))


def test_sinkhorn_spreads_samples_equally_and_survives_extreme_scores():
    codes = sinkhorn(unit(12, 4, seed=5), 0.5, iterations=100)
    torch.testing.assert_close(codes.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64))
    extreme = torch.ones(8, 5).index_fill_(1, torch.tensor(0), -1.0)
    assert torch.isfinite(sinkhorn(extreme, 0.025)).all()


def test_swapped_prediction_is_the_formula_and_lightlys():
    scores = unit(4, 3, 6)  # two large and two small views, three samples, six prototypes
    codes = sinkhorn(scores[:2], 0.05)

    def naive(scores):
        total = 0.0
        for a in range(2):
            for v in range(4):
                for n in range(3):
                    p = torch.exp(scores[v, n] / T) / torch.exp(scores[v, n] / T).sum()
                    total = total - (codes[a, n] * torch.log(p)).sum() * (v != a)
        return total / (2 * 3 * 3)

    def lightlys(scores):
        return SwaVLoss(T, 3, 0.05)([*scores[:2]], [*scores[2:]]).squeeze()

    def ours(scores):
        return swapped_prediction(scores, codes, T)

    assert_equal(ours, naive, scores)
    assert_equal(ours, lightlys, scores)
    assert ours(torch.ones(4, 3, 6).double()).item() == pytest.approx(math.log(6))

"""InfoNCE against the formula as loops, against lightly, and against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.losses import info_nce


def unit(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, columns, generator=generator, dtype=torch.float64), dim=1)


def naive_info_nce(q, k, negatives, temperature):
    total = 0.0
    for i in range(len(q)):
        similarities = [(q[i] * k[i]).sum()] + [(q[i] * n).sum() for n in negatives]
        exponentials = [torch.exp(s / temperature) for s in similarities]
        total = total - torch.log(exponentials[0] / sum(exponentials))
    return total / len(q)


@pytest.mark.parametrize("chunk", [1, 5, 17, 4096])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_and_its_gradients_equal_the_formula_as_loops(temperature, chunk):
    q, k, negatives = unit(6, 8, 0), unit(6, 8, 1), unit(17, 8, 2)
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    loss, _ = info_nce(*leaves, negatives, temperature, chunk=chunk)
    loss.backward()
    expected = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    naive = naive_info_nce(*expected, negatives, temperature)
    naive.backward()
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(leaves[0].grad, expected[0].grad)
    torch.testing.assert_close(leaves[1].grad, expected[1].grad)


def test_info_nce_and_its_gradients_equal_lightlys_with_a_bank():
    """lightly scales its inputs to unit length, so unscaled ones test that gradient as well."""
    generator = torch.Generator().manual_seed(3)
    raw = [torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    negatives = unit(17, 8, 2)
    peer = pytest.importorskip("lightly.loss")  # not of the oldest torch
    lightlys = peer.NTXentLoss(0.2, memory_bank_size=(17, 8))
    lightlys.memory_bank.bank = negatives.clone()
    ours, theirs = ([x.clone().requires_grad_() for x in raw] for _ in range(2))
    loss, _ = info_nce(*(F.normalize(x, dim=1) for x in ours), negatives, 0.2)
    expected = lightlys(*theirs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs)
    )


def test_loss_is_log_of_keys_plus_one_when_all_similarities_are_equal():
    q = F.normalize(torch.ones(4, 3), dim=1)
    loss, _ = info_nce(q, q, q[:1].expand(99, 3), 0.07)
    assert loss.item() == pytest.approx(math.log(100), rel=1e-6)


def test_correct_marks_queries_whose_key_beats_every_negative():
    q = torch.eye(3)
    k = torch.stack([q[0], q[0], q[2]])  # the second key belongs to another query
    _, correct = info_nce(q, k, torch.tensor([[0.0, 0.9, 0.0]]), 0.1)
    assert correct.tolist() == [True, False, True]
    assert not correct.requires_grad


def test_a_negative_that_is_as_similar_as_the_key_is_not_beaten():
    _, correct = info_nce(torch.eye(2), torch.eye(2), torch.tensor([[1.0, 0.0]]), 1.0)
    assert correct.tolist() == [False, True]


def test_negatives_may_be_overwritten_before_the_backward_pass():
    q, k, negatives = unit(6, 8, 0).requires_grad_(), unit(6, 8, 1), unit(17, 8, 2)
    info_nce(q, k, negatives, 0.1)[0].backward()
    expected, q.grad = q.grad.clone(), None
    loss, _ = info_nce(q, k, negatives, 0.1)
    negatives.zero_()
    loss.backward()
    torch.testing.assert_close(q.grad, expected)


def test_large_logits_do_not_overflow():
    q = unit(4, 8, 0).float().requires_grad_()
    loss, _ = info_nce(q, -q.detach(), q.detach(), 1e-3)
    loss.backward()
    assert loss.item() == pytest.approx(2000, rel=1e-3)
    assert torch.isfinite(q.grad).all()


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_flatten(result)[0]:
            # Views own no memory: what counts is the storage.
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_neither_the_logits_nor_a_copy_of_the_queue_are_ever_made():
    rows, keys, dim, chunk = 64, 8192, 16, 512
    q, k, negatives = unit(rows, dim, 0), unit(rows, dim, 1), unit(keys, dim, 2)
    with LargestTensor() as ours:
        info_nce(q.requires_grad_(), k, negatives, 0.1, chunk=chunk)[0].backward()
    assert ours.numel == rows * chunk
    with LargestTensor() as materialised:
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], dim=1)
        F.cross_entropy(logits / 0.1, torch.zeros(rows, dtype=torch.long)).backward()
    assert materialised.numel == rows * (keys + 1)

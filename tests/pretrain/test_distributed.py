"""Collectives on 2 and 4 gloo ranks against indexing of the joined batch."""

import pytest
import torch
from torch import nn

from moco_common import comm
from moco_common.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm
from pretrain import distributed
from tests.pretrain.ranks import on_ranks


@pytest.fixture(scope="module")
def two_ranks():
    """What each function returned on each of two ranks, which are started once."""
    return list(zip(*on_ranks(2, everything), strict=True))


def everything():
    return [permuted(6, torch.uint8, True), gathered_and_averaged(), of_one_rank(), exchanged()]


def permuted(n, dtype, channels_last):
    total = n * comm.world_size()
    batch = torch.arange(total * 3 * 2 * 2).reshape(total, 3, 2, 2).to(dtype)
    mine = batch[comm.rank() * n :][:n]
    if channels_last:
        mine = mine.contiguous(memory_format=torch.channels_last)
    permutation = torch.randperm(total, generator=torch.Generator().manual_seed(5))
    shuffled = distributed.permute_batch(mine, permutation)
    restored = distributed.permute_batch(shuffled, permutation.argsort())
    return {
        "shuffled": shuffled,
        "restored": torch.equal(restored, mine),
        "expected": batch[permutation][comm.rank() * n :][:n],
        "channels_last": shuffled.is_contiguous(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize(
    ("world", "dtype", "channels_last"),
    [(1, torch.uint8, False), (2, torch.uint8, True), (4, torch.float32, False)],
)
def test_unshuffle_inverts_shuffle_across_ranks(two_ranks, world, dtype, channels_last):
    results = on_ranks(world, permuted, 6, dtype, channels_last) if world != 2 else two_ranks[0]
    for result in results:
        assert torch.equal(result["shuffled"], result["expected"])
        assert result["shuffled"].dtype == dtype
        assert result["restored"]
        assert result["channels_last"] or not channels_last


def gathered_and_averaged():
    rank = comm.rank()
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    net[0].running_mean.fill_(rank)
    net[0].running_var.fill_(10.0 * rank)
    net[1].weight.data.fill_(rank)
    distributed.average_batch_norm(net)
    gathered = comm.all_gather(torch.full((2, 3), float(rank)))
    return [net[0].running_mean, net[0].running_var, net[1].weight.data, gathered]


def test_gather_keeps_rank_order_and_only_bn_statistics_are_averaged(two_ranks):
    for rank, (mean, variance, weight, gathered) in enumerate(two_ranks[1]):
        assert mean.tolist() == [0.5, 0.5]
        assert variance.tolist() == [5.0, 5.0]
        assert (weight == rank).all()
        assert gathered[:, 0].tolist() == [0, 0, 1, 1]


TEXTS = ("é", "", "a longer text")


def exchanged():
    """Texts and tensors of several kinds; whether they are new; a wrapped module's buffers."""
    rank = comm.rank()
    mixed = [torch.full((2, 2), float(rank)), torch.tensor(10.0 * rank)]
    identities = [tensor.data_ptr() for tensor in mixed]
    distributed.all_reduce_mean([])
    distributed.all_reduce_mean(mixed)
    assert [tensor.data_ptr() for tensor in mixed] == identities
    x = torch.full((3, 2), rank + 1.0).T  # not contiguous
    total = distributed.all_reduce_sum(x)
    assert x.unique().tolist() == [rank + 1.0]
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    nn.init.constant_(module[0].weight, 1.0)
    module[1].running_mean.fill_(rank)
    wrapped = distributed.wrap(module.eval())
    wrapped(torch.full((1, 1), rank + 1.0)).sum().backward()
    return {
        "texts": [distributed.all_gather_text(t if rank == 0 else t[::-1]) for t in TEXTS],
        "mixed": mixed,
        "total": total,
        "running mean": module[1].running_mean,
        "gradient": module[0].weight.grad,
    }


def test_texts_means_and_sums_are_those_of_all_ranks_and_buffers_stay_each_ranks_own(two_ranks):
    for rank, found in enumerate(two_ranks[3]):
        assert found["texts"] == [[text, text[::-1]] for text in TEXTS]
        assert [tensor.tolist() for tensor in found["mixed"]] == [[[0.5] * 2] * 2, 5.0]
        assert found["total"].tolist() == [[3.0] * 3] * 2
        assert found["running mean"].item() == rank
        scale = 1 / (1 + 1e-5) ** 0.5  # of batch norm in evaluation mode
        torch.testing.assert_close(found["gradient"], torch.full((1, 1), 1.5 * scale))


W, N = 2, 3  # ranks, rows on each
ORDER = torch.tensor([4, 0, 5, 1, 3, 2])


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(W * N, *shape, generator=generator, dtype=torch.float64)


def losses(everyone, shuffled, normalised):
    """One loss for each rank, from tensors of the global batch; any smooth function would do."""
    weights = rows(2, seed=1)
    result = []
    for r in range(W):
        own = slice(r * N, (r + 1) * N)
        loss = (everyone * weights.roll(r, 0)).sum().sin() + (shuffled[own] ** 3).sum()
        result.append(loss + (normalised[own] * weights[own]).sum() ** 2)
    return result


def of_one_rank():
    rank = comm.rank()
    own = slice(rank * N, (rank + 1) * N)
    x = rows(2)[own].requires_grad_()
    norm = SyncBatchNorm(2).double()
    images = rows(2, 4, 4, seed=2)[own].contiguous(memory_format=torch.channels_last)
    everyone = comm.all_gather(x)
    shuffled = torch.zeros(W * N, 2, dtype=torch.float64)
    shuffled[own] = distributed.permute_batch(x, ORDER)
    normalised = torch.zeros(W * N, 2, dtype=torch.float64)
    normalised[own] = norm(x) * norm(images).detach().square().mean((2, 3))
    loss = losses(everyone, shuffled, normalised)[rank]
    loss.backward()
    total = distributed.all_reduce_sum(loss.detach())
    state = {name: value.double() for name, value in norm.state_dict().items()}
    gradients = comm.all_gather(x.grad / W)
    weight = norm.weight.grad.clone()
    distributed.all_reduce_mean([weight])
    return {"loss": total / W, "x": gradients, "weight": weight, "state": state}


def test_gradients_through_gather_permutation_and_synchronised_bn_are_of_one_process(two_ranks):
    x, images = rows(2).requires_grad_(), rows(2, 4, 4, seed=2)
    norm = nn.BatchNorm1d(2).double()
    normalised = norm(x)
    on_images = nn.BatchNorm2d(2).double()  # the same layer, when it has seen vectors
    on_images.load_state_dict(norm.state_dict())
    scale = on_images(images).detach().square().mean((2, 3))
    loss = torch.stack(losses(x, x[ORDER], normalised * scale)).mean()
    loss.backward()
    for result in two_ranks[2]:
        torch.testing.assert_close(result["loss"], loss.detach())
        torch.testing.assert_close(result["x"], x.grad)
        torch.testing.assert_close(result["weight"], norm.weight.grad)
        for name, value in on_images.state_dict().items():
            torch.testing.assert_close(result["state"][name], value.double())


def test_with_one_process_every_collective_is_the_identity():
    x = rows(2).requires_grad_()
    assert comm.all_gather(x) is x
    assert torch.equal(distributed.all_reduce_sum(x), x)
    assert distributed.all_reduce_sum(x).data_ptr() != x.data_ptr()
    distributed.permute_batch(x, ORDER).mul(rows(2, seed=1)).sum().backward()
    torch.testing.assert_close(x.grad[ORDER], rows(2, seed=1))
    tensors = [torch.ones(2), torch.tensor(3.0)]
    distributed.all_reduce_mean(tensors)
    assert [tensor.tolist() for tensor in tensors] == [[1, 1], 3]
    assert distributed.all_gather_text("é") == ["é"]
    net = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()).double()
    assert distributed.wrap(net) is net
    expected = net(x)
    net[0].requires_grad_(False)
    synchronise_batch_norm(net)
    assert isinstance(net[0], SyncBatchNorm)
    assert [p.requires_grad for p in net.parameters()] == [False, False]
    torch.testing.assert_close(net(x), expected)

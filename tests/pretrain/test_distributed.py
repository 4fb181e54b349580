"""Collectives on 2 and 4 gloo ranks against indexing of the joined batch."""

import pytest
import torch
from torch import nn

from pretrain import distributed
from tests.pretrain.ranks import on_ranks


def permuted(n, dtype, channels_last):
    total = n * distributed.world_size()
    batch = torch.arange(total * 3 * 2 * 2).reshape(total, 3, 2, 2).to(dtype)
    mine = batch[distributed.rank() * n :][:n]
    if channels_last:
        mine = mine.contiguous(memory_format=torch.channels_last)
    permutation = torch.randperm(total, generator=torch.Generator().manual_seed(5))
    shuffled = distributed.permute_batch(mine, permutation)
    restored = distributed.permute_batch(shuffled, permutation.argsort())
    return {
        "shuffled": shuffled,
        "restored": torch.equal(restored, mine),
        "expected": batch[permutation][distributed.rank() * n :][:n],
        "channels_last": shuffled.is_contiguous(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize(
    ("world", "dtype", "channels_last"),
    [(1, torch.uint8, False), (2, torch.uint8, True), (4, torch.float32, False)],
)
def test_unshuffle_inverts_shuffle_across_ranks(world, dtype, channels_last):
    for result in on_ranks(world, permuted, 6, dtype, channels_last):
        assert torch.equal(result["shuffled"], result["expected"])
        assert result["shuffled"].dtype == dtype
        assert result["restored"]
        assert result["channels_last"] or not channels_last


def gathered_and_averaged():
    rank = distributed.rank()
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    net[0].running_mean.fill_(rank)
    net[0].running_var.fill_(10.0 * rank)
    net[1].weight.data.fill_(rank)
    distributed.average_batch_norm(net)
    gathered = distributed.all_gather(torch.full((2, 3), float(rank)))
    return [net[0].running_mean, net[0].running_var, net[1].weight.data, gathered]


def test_gather_keeps_rank_order_and_only_bn_statistics_are_averaged():
    for rank, (mean, variance, weight, gathered) in enumerate(on_ranks(2, gathered_and_averaged)):
        assert mean.tolist() == [0.5, 0.5]
        assert variance.tolist() == [5.0, 5.0]
        assert (weight == rank).all()
        assert gathered[:, 0].tolist() == [0, 0, 1, 1]

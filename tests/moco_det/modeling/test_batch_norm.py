"""Whose batch norm over processes is one process's on the joined batch, and whose is not."""

from functools import cache

import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn

from moco_common.sync_batch_norm import SyncBatchNorm
from moco_det.modeling.batch_norm import (
    norm_notes,
    norms_apart,
    replace_sync_bn,
    update_statistics,
)
from tests.moco_det.ranks import on_ranks

CHANNELS = 3
NORMS = {
    "naiveSyncBN": NaiveSyncBatchNorm,
    "naiveSyncBN_N": lambda channels: NaiveSyncBatchNorm(channels, stats_mode="N"),
    "ours": SyncBatchNorm,
}


def test_norms_apart_wait_for_no_other_process_and_are_put_back():
    """As the memory preflight needs it: a process that ran out of memory sends nothing."""
    kinds = (NaiveSyncBatchNorm, nn.SyncBatchNorm, SyncBatchNorm)
    model = nn.Sequential(*(kind(CHANNELS) for kind in kinds), nn.BatchNorm2d(CHANNELS))
    before, weights = list(model), list(model.parameters())
    x = torch.randn(2, CHANNELS, 4, 4)
    with norms_apart(model):
        assert [type(norm) for norm in model] == [nn.BatchNorm2d] * 4
        assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
        expected = nn.functional.batch_norm(x, None, None, training=True)
        torch.testing.assert_close(model[0](x), expected)
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert before[0].num_batches_tracked == 1  # the buffers are those of the norms


# What each rank sees: N, H, W.
SHARES = {
    "alike": [(2, 5, 4)] * 4,
    "counts differ": [(1, 5, 4), (3, 5, 4), (2, 5, 4), (4, 5, 4)],
    "sizes differ": [(2, 5, 7), (2, 9, 4), (2, 2, 2), (2, 6, 6)],
    "both differ": [(2, 5, 7), (1, 9, 4), (3, 2, 2), (1, 6, 6)],
    "none on a rank": [(2, 5, 7), (0, 9, 4), (3, 2, 2), (1, 6, 6)],
}
TRUE = {
    "naiveSyncBN": {"alike"},
    "naiveSyncBN_N": {"alike", "counts differ"},
    "ours": set(SHARES),
}


def inputs_of(case, rank):
    """Input and gradient of the output; the ranks' means lie apart, so that weights matter."""
    generator = torch.Generator().manual_seed(rank)
    n, height, width = SHARES[case][rank]
    x = torch.randn(n, CHANNELS, height, width, generator=generator) * (1 + rank) + 2 * rank
    return x, torch.randn(x.shape, generator=generator)


def run(norm, x, gradient):
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(gradient)
    return {
        "value": y.detach(),
        "gradient": x.grad,
        "of weight": norm.weight.grad,
        "of bias": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }


def small_network(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        norm(CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False), nn.ReLU(), norm(CHANNELS)
    )


def micro_batches():
    """Six, of unequal sizes and with their own means; the last two have one image."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(4, 6, 5), (1, 9, 8), (2, 4, 12), (3, 7, 7), (1, 5, 6), (1, 8, 4)]
    return [
        torch.randn(n, CHANNELS, h, w, generator=generator) * (i + 1) + i
        for i, (n, h, w) in enumerate(sizes)
    ]


def statistics_of(network):
    return {k: v.clone() for k, v in network.state_dict().items() if "running" in k}


def on_a_rank(rank, world_size):
    found = {
        name: {
            case: run(build(CHANNELS), *inputs_of(case, rank))
            for case in SHARES
            if name == "ours" or case != "none on a rank"
        }
        for name, build in NORMS.items()
    }
    try:
        run(nn.SyncBatchNorm(CHANNELS), *inputs_of("alike", rank))
        found["torch"] = "runs"
    except ValueError as error:
        found["torch"] = str(error)
    network = small_network(nn.BatchNorm2d)
    update_statistics(network, micro_batches()[rank::world_size])
    found["precise"] = statistics_of(network)
    network = small_network(SyncBatchNorm)
    alike = torch.cat([b[:1, :, :4, :4] for b in micro_batches()[:4]])
    update_statistics(network, [alike[rank::world_size]])
    found["precise, synchronised"] = statistics_of(network)
    return found


@cache
def ranks(world_size):
    return on_ranks(world_size, on_a_rank, world_size)


@cache
def oracle(case, world_size):
    """One process's norm on the pixels of all ranks; values and gradients in the ranks' shapes."""
    pairs = [inputs_of(case, rank) for rank in range(world_size)]
    pixels = [torch.cat([flat(pair[i]) for pair in pairs]) for i in (0, 1)]
    return run(nn.BatchNorm1d(CHANNELS), *pixels)


def flat(x):
    return x.permute(0, 2, 3, 1).reshape(-1, CHANNELS)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", SHARES)
@pytest.mark.parametrize("name", NORMS)
def test_which_norms_are_one_process_on_the_joined_batch(name, case, world_size):
    if name != "ours" and case == "none on a rank":
        pytest.skip("Detectron2's refuse it, or one of two ranks sees everything")
    found = [rank[name][case] for rank in ranks(world_size)]
    true = oracle(case, world_size)

    def close(a, b):
        return torch.allclose(a, b, rtol=1e-4, atol=1e-4)

    values = {
        key: close(torch.cat([flat(f[key]) for f in found]), true[key])
        for key in ("value", "gradient")
    }
    # DDP averages parameters' gradients; their sum is the joined batch's.
    values |= {key: close(sum(f[key] for f in found), true[key]) for key in ("of weight",)}
    assert close(sum(f["of bias"] for f in found), true["of bias"])  # no statistic is in it
    mean = all(close(f["running_mean"], true["running_mean"]) for f in found)
    assert set(values.values()) | {mean} == {case in TRUE[name]}, (values, mean)
    if name == "ours":
        for f in found:
            torch.testing.assert_close(f["running_var"], true["running_var"])


def test_torchs_sync_bn_refuses_a_cpu():
    assert all("expected input tensor to be on GPU" in rank["torch"] for rank in ranks(2))


@pytest.mark.parametrize("world_size", [2, 4])
def test_detectron2s_norms_track_the_biased_variance(world_size):
    """The one difference that they have from one process where all ranks see alike."""
    true = oracle("alike", world_size)["running_var"]
    count = 2 * 5 * 4 * world_size
    for name in ("naiveSyncBN", "naiveSyncBN_N"):
        found = ranks(world_size)[0][name]["alike"]["running_var"]
        biased = 0.9 + (true - 0.9) * (count - 1) / count
        torch.testing.assert_close(found, biased, rtol=1e-4, atol=1e-4)


def test_a_replaced_norm_keeps_parameters_buffers_and_names():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.SyncBatchNorm(3, eps=1e-3)))
    before = dict(network.named_parameters()), network.state_dict()
    norm = network[1][0]
    norm.running_mean.fill_(0.5)
    assert replace_sync_bn(network) == 1
    assert isinstance(network[1][0], SyncBatchNorm)
    assert network[1][0].eps == 1e-3
    assert all(p is before[0][name] for name, p in network.named_parameters())
    assert list(network.state_dict()) == list(before[1])
    assert network[1][0].running_mean is norm.running_mean
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(network(x), nn.BatchNorm2d(3, eps=1e-3)(network[0](x)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_true_statistics_do_not_depend_on_the_processes(world_size):
    """Oracle: one process over the same micro-batches. Six on four ranks: two see one less."""
    one = small_network(nn.BatchNorm2d)
    assert update_statistics(one, micro_batches()) == 2
    for rank in ranks(world_size):
        for name, value in statistics_of(one).items():
            torch.testing.assert_close(rank["precise"][name], value, rtol=1e-5, atol=1e-5)
            assert torch.equal(rank["precise"][name], ranks(world_size)[0]["precise"][name])


@pytest.mark.parametrize("world_size", [2, 4])
def test_true_statistics_with_a_synchronised_norm_are_those_of_the_joined_batch(world_size):
    one = small_network(nn.BatchNorm2d)
    update_statistics(one, [torch.cat([b[:1, :, :4, :4] for b in micro_batches()[:4]])])
    for rank in ranks(world_size):
        for name, value in statistics_of(one).items():
            found = rank["precise, synchronised"][name]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


def test_true_statistics_are_those_of_all_pixels_together():
    network = small_network(nn.BatchNorm2d)
    update_statistics(network, micro_batches())
    pixels = torch.cat([flat(batch) for batch in micro_batches()]).double()
    torch.testing.assert_close(network[0].running_mean.double(), pixels.mean(0))
    torch.testing.assert_close(network[0].running_var.double(), pixels.var(0, correction=0))
    unweighted = torch.stack([flat(batch).mean(0) for batch in micro_batches()]).mean(0)
    assert not torch.allclose(network[0].running_mean, unweighted, rtol=0.05)


def test_a_layer_in_evaluation_mode_and_one_that_is_not_used_keep_their_statistics():
    network = small_network(nn.BatchNorm2d)
    network[3].eval()
    network.add_module("unused", nn.BatchNorm2d(CHANNELS))
    network.forward = lambda x: network[3](network[1](network[0](x)))
    assert update_statistics(network, micro_batches()) == 2
    for norm in (network[3], network.unused):
        assert torch.equal(norm.running_mean, torch.zeros(CHANNELS))


@pytest.mark.parametrize(
    ("norm", "per_pass", "passes", "world_size", "notes"),
    [
        (nn.BatchNorm2d, 2, 1, 1, []),
        (nn.BatchNorm2d, 2, 8, 1, ["BN sees the 2 images of one pass"]),
        (nn.BatchNorm2d, 1, 1, 4, ["BN over a single image costs"]),
        (SyncBatchNorm, 1, 1, 2, []),
        (NaiveSyncBatchNorm, 1, 4, 2, ["the same weight", "BN sees the 2 images of one pass"]),
        (lambda channels: nn.GroupNorm(1, channels), 1, 4, 1, []),
    ],
)
def test_what_bn_sees_is_noted(norm, per_pass, passes, world_size, notes):
    lines = norm_notes(norm(3), per_pass=per_pass, passes=passes, world_size=world_size)
    assert len(lines) == len(notes)
    for line, part in zip(lines, notes, strict=True):
        assert part in line

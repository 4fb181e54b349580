"""Synchronised batch norm on two ranks against torch's on the joined batch, option by option."""

import pytest
import torch
from torch import nn

from moco_common import comm
from moco_common.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm
from tests.pretrain.ranks import on_ranks

OPTIONS = {
    "plain": {},
    "cumulative average": {"momentum": None},
    "fast average, large epsilon": {"momentum": 0.7, "eps": 0.5},
    "without weight and bias": {"affine": False},
    "without running statistics": {"track_running_stats": False},
}
ROWS = {"equal": (3, 3), "unequal": (5, 1), "all on one": (0, 4), "one row": (1, 0), "none": (0, 0)}
STEPS = 3


def rows(case, step):
    """The joined batch of a step, the ranks' rows in rank order."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(ROWS[case]), 2, generator=generator, dtype=torch.float64)
    return x * (step + 1) + step


def train(norm, case, own=slice(None)):
    """Outputs and final state of some steps in training mode, and an output in evaluation mode."""
    norm = norm.double()
    if norm.affine:
        nn.init.constant_(norm.weight, 1.5)
        nn.init.constant_(norm.bias, -0.25)
    outputs = [norm(rows(case, step)[own]) for step in range(STEPS)]
    result = {"outputs": torch.stack(outputs).detach()}
    if norm.track_running_stats:
        result["evaluated"] = norm.eval()(rows("equal", 9))
    return result | {name: value.double() for name, value in norm.state_dict().items()}


def on_a_rank():
    first = comm.rank() * 10**6
    found = {}
    for case, (one, other) in ROWS.items():
        own = slice(0, one) if comm.rank() == 0 else slice(one, one + other)
        for name, options in OPTIONS.items():
            found[f"{case}, {name}"] = train(SyncBatchNorm(2, **options), case, own)
    for dtype in (torch.float16, torch.bfloat16):
        generator = torch.Generator().manual_seed(comm.rank())
        x = 100 + torch.randn(8, 2, 3, 3, generator=generator)
        found[str(dtype)] = {"x": x.to(dtype), "y": SyncBatchNorm(2)(x.to(dtype)).detach()}
    norm = synchronise_batch_norm(module := nn.Sequential(nn.BatchNorm2d(2)).eval())
    found["replaced"] = {"count": norm, "evaluated": module(torch.ones(1, 2, 2, 2) + first)}
    try:
        SyncBatchNorm(2)(torch.ones(4, 2, 5))
        found["three dimensions"] = "accepted"
    except ValueError as error:
        found["three dimensions"] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(2, on_a_rank)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", ["equal", "unequal", "all on one"])
def test_every_option_is_that_of_one_process_on_the_joined_batch(ranks, case, options):
    expected = train(nn.BatchNorm1d(2, **OPTIONS[options]), case)
    outputs = expected.pop("outputs")
    found = [dict(rank[f"{case}, {options}"]) for rank in ranks]
    steps = [rank.pop("outputs").unbind() for rank in found]
    joined = torch.stack([torch.cat(step) for step in zip(*steps, strict=True)])
    torch.testing.assert_close(joined, outputs)
    for rank in found:
        assert rank.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(rank[name], value)


def test_a_single_row_on_all_ranks_has_its_own_value_as_mean(ranks):
    """torch refuses it; the output is the bias, and the running variance has no spread to learn."""
    for rank, n in zip(ranks, ROWS["one row"], strict=True):
        found = rank["one row, plain"]
        torch.testing.assert_close(found["outputs"], torch.full((STEPS, n, 2), -0.25).double())
        mean = torch.zeros(2).double()
        for step in range(STEPS):
            mean = 0.9 * mean + 0.1 * rows("one row", step)[0]
        torch.testing.assert_close(found["running_mean"], mean)
        torch.testing.assert_close(found["running_var"], torch.full((2,), 0.9**STEPS).double())


def test_without_a_row_on_any_rank_nothing_is_learned(ranks):
    for rank in ranks:
        found = rank["none, plain"]
        assert found["outputs"].shape == (STEPS, 0, 2)
        assert found["running_mean"].tolist() == [0, 0]
        assert found["running_var"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32_and_returned_as_it_came(ranks, dtype):
    x, y = (torch.cat([rank[str(dtype)][name] for rank in ranks]) for name in "xy")
    assert y.dtype == dtype
    expected = nn.BatchNorm2d(2)(x.float()).to(dtype)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_a_replaced_layer_keeps_its_mode(ranks):
    for number, rank in enumerate(ranks):
        assert rank["replaced"]["count"] == 1
        expected = nn.BatchNorm2d(2).eval()(torch.ones(1, 2, 2, 2) + number * 10**6)
        torch.testing.assert_close(rank["replaced"]["evaluated"], expected)


def test_an_input_of_other_dimensions_is_refused_on_ranks_too(ranks):
    assert {rank["three dimensions"] for rank in ranks} == {"expected 2D or 4D input, got 3D"}


def test_a_replaced_layer_keeps_every_option():
    for options in OPTIONS.values():
        module = nn.Sequential(nn.Sequential(nn.BatchNorm2d(2, **options)), nn.BatchNorm1d(2))
        before = {name: id(value) for name, value in module.state_dict(keep_vars=True).items()}
        old = module[0][0]
        assert synchronise_batch_norm(module) == 2
        new = module[0][0]
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            assert getattr(new, name) == getattr(old, name)
        assert before == {n: id(value) for n, value in module.state_dict(keep_vars=True).items()}
        assert synchronise_batch_norm(module, (nn.SyncBatchNorm,)) == 0

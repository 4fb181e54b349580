"""Learning rates against the papers' values and closed forms."""

import math

import pytest

from pretrain.errors import UserError
from pretrain.schedules import learning_rate


def rate(step, schedule="step", **kwargs):
    return learning_rate(step, 200, base=0.03, schedule=schedule, **kwargs)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.03), (119, 0.03), (120, 0.003), (159, 0.003), (160, 3e-4)]
)
def test_step_schedule_drops_at_epochs_120_and_160_of_200(epoch, expected):
    assert rate(epoch) == pytest.approx(expected)


@pytest.mark.parametrize("epoch", [0, 50, 100, 199])
def test_cosine_is_half_a_cosine_from_the_base_to_zero(epoch):
    assert rate(epoch, "cosine") == pytest.approx(0.03 * (1 + math.cos(math.pi * epoch / 200)) / 2)


def test_warmup_rises_linearly_to_the_base_and_the_cosine_starts_there():
    rates = [rate(step, "cosine", warmup=10) for step in range(11)]
    assert rates[:10] == pytest.approx([0.003 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.03)
    assert rate(105, "cosine", warmup=10) == pytest.approx(0.015)


def test_constant_stays_and_an_unknown_schedule_is_refused():
    assert rate(199, "constant") == 0.03
    with pytest.raises(UserError, match="choose one of step, cosine, constant"):
        rate(0, "linear")

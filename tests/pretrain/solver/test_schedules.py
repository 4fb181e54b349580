"""Learning rates against the papers' values and closed forms."""

import math

import pytest

from moco_common.errors import UserError
from pretrain.config.defaults import load_config
from pretrain.solver.schedules import learning_rate, total_steps


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


def test_a_cosine_may_end_above_zero_as_swavs_does():
    """Caron et al. 2020, Appendix A: from 4.8 to 0.0048."""
    solver = load_config("swav").SOLVER
    run = {"base": solver.BASE_LR, "schedule": solver.SCHEDULE, "end": solver.END_SHARE}
    rates = [learning_rate(step, 1000, **run) for step in (0, 500, 1000)]
    assert rates == pytest.approx([4.8, (4.8 + 0.0048) / 2, 0.0048])
    with pytest.raises(UserError, match="SOLVER.END_SHARE is 2"):
        rate(0, "cosine", end=2)


def test_warmup_rises_linearly_to_the_base_and_the_cosine_starts_there():
    rates = [rate(step, "cosine", warmup=10) for step in range(11)]
    assert rates[:10] == pytest.approx([0.003 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.03)
    assert rate(105, "cosine", warmup=10) == pytest.approx(0.015)


def test_constant_stays_and_an_unknown_schedule_is_refused():
    assert rate(199, "constant") == 0.03
    with pytest.raises(UserError, match="choose one of step, cosine, exponential, constant"):
        rate(0, "linear")


def test_instagram_1b_decays_by_a_tenth_every_62500_iterations():
    """He et al. 2020, section 4: lr 0.12 at batch 1024, times 0.9 after every 62.5k iterations (64M
    images), 1.25M iterations, about 1.4 epochs of 940M images."""
    run = {"base": 0.12, "schedule": "exponential", "gamma": 0.9, "decay_period": 62_500}
    rates = [learning_rate(step, 1_250_000, **run) for step in range(0, 1_250_000, 12_500)]
    assert rates == pytest.approx([0.12 * 0.9**i for i in range(20) for _ in range(5)])
    assert learning_rate(62_499, 1_250_000, **run) == pytest.approx(0.12)
    assert learning_rate(62_500, 1_250_000, **run) == pytest.approx(0.108)
    assert learning_rate(1_249_999, 1_250_000, **run) == pytest.approx(0.0162, abs=1e-4)
    assert 62_500 * 1024 == 64_000_000
    with pytest.raises(UserError, match="SOLVER.DECAY_PERIOD is 0"):
        learning_rate(0, 10, base=0.12, schedule="exponential")


@pytest.mark.parametrize(
    ("epochs", "max_iter", "expected"),
    [(200, 0, 1_000_912), (0, 1_250_000, 1_250_000), (200, 500, 500), (1, 9_000_000, 5005)],
)
def test_a_run_is_as_long_as_its_epochs_or_its_iterations(epochs, max_iter, expected):
    """ImageNet: 1,281,167 images in batches of 256 are 5,004.56 iterations an epoch."""
    images = 1_281_167
    assert total_steps(images, batch_size=256, epochs=epochs, max_iter=max_iter) == expected


@pytest.mark.parametrize(("epochs", "max_iter"), [(0, 0), (-1, 5), (5, -1)])
def test_a_run_of_no_length_is_refused(epochs, max_iter):
    with pytest.raises(UserError, match="set one of them above 0"):
        total_steps(100, batch_size=8, epochs=epochs, max_iter=max_iter)

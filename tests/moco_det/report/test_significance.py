"""Small-sample statistics against numpy, scipy, printed t tables and a naive loop."""

import math
import random

import numpy as np
import pytest

from moco_det.report.significance import student_t_quantile, summarize, welch_difference


def test_summary_is_numpys_mean_and_sample_deviation():
    values = [33.1, 34.0, 33.4, 35.2]
    summary = summarize(values)
    assert (summary.n, summary.mean) == (4, pytest.approx(np.mean(values)))
    assert summary.std == pytest.approx(np.std(values, ddof=1))


def test_one_run_has_no_spread_and_no_interval():
    assert summarize([40.0]).std is None
    difference = welch_difference([40.0], [30.0, 31.0])
    assert difference.mean == 9.5
    assert (difference.interval, difference.why_no_interval) == (None, "n = 1")


def test_equal_runs_have_no_interval_instead_of_one_of_width_zero():
    difference = welch_difference([1.0, 1.0], [2.0, 2.0])
    assert (difference.interval, difference.why_no_interval) == (None, "no spread")


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        summarize([])


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (120, 1.9799)]
)
def test_quantiles_are_those_of_the_printed_table(df, expected):
    assert student_t_quantile(0.975, df) == pytest.approx(expected, abs=6e-5)
    assert student_t_quantile(0.025, df) == pytest.approx(-expected, abs=6e-5)


def test_quantile_with_one_degree_of_freedom_is_cauchys():
    for probability in (0.6, 0.9, 0.99, 0.999):
        expected = math.tan(math.pi * (probability - 0.5))
        assert student_t_quantile(probability, 1) == pytest.approx(expected, rel=1e-9)


def test_quantiles_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 1.3, 2, 3.7, 8, 50.5, 1000):
        for probability in (0.01, 0.3, 0.5, 0.9, 0.975, 0.9995):
            expected = stats.t.ppf(probability, df)
            assert student_t_quantile(probability, df) == pytest.approx(expected, rel=1e-7)


def test_welch_interval_equals_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    for n, m in ((2, 2), (3, 3), (5, 3), (2, 10)):
        a = [draw.gauss(55, 0.3) for _ in range(n)]
        b = [draw.gauss(54, 2.0) for _ in range(m)]
        expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
        difference = welch_difference(a, b, confidence=0.9)
        assert difference.interval == pytest.approx((expected.low, expected.high), rel=1e-7)


def test_welch_interval_covers_the_true_difference_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = welch_difference(draw.normal(1, 1, 4), draw.normal(0, 3, 3), 0.9).interval
        covered += low <= 1 <= high
    assert 0.86 < covered / 400 < 0.95  # Welch's is a little conservative at such sizes


def test_difference_changes_sign_with_the_order():
    a, b = [1.0, 2.0, 4.0], [7.0, 9.0]
    forth, back = welch_difference(a, b), welch_difference(b, a)
    assert forth.mean == -back.mean
    assert forth.interval == pytest.approx((-back.interval[1], -back.interval[0]))

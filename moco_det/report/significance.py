"""Means, standard deviations and differences of small samples, such as a few seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1 in the denominator); `std` is None for n = 1."""

    n: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """mean(a) - mean(b) and its two-sided confidence interval.

    `interval` and `degrees_of_freedom` are None where the samples do not determine an interval;
    `why_no_interval` then gives the reason.
    """

    mean: float
    interval: tuple[float, float] | None
    confidence: float
    degrees_of_freedom: float | None
    why_no_interval: str | None = None


def summarize(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of at least one value.

    Raises:
        ValueError: the sample is empty.
    """
    if not len(values):
        raise ValueError("a summary needs at least one value")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), std)


def welch_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> Difference:
    """mean(a) - mean(b) with Welch's interval, which does not assume equal variances.

    Source: B. L. Welch, "The generalization of 'Student's' problem when several different
    population variances are involved", Biometrika 34, 1947.
    """
    first, second = summarize(a), summarize(b)
    mean = first.mean - second.mean
    if first.std is None or second.std is None:
        return Difference(mean, None, confidence, None, "n = 1")
    va, vb = first.std**2 / first.n, second.std**2 / second.n
    if va + vb == 0:
        return Difference(mean, None, confidence, None, "no spread")
    # Each share is at most 1 and one of them is at least 1/2, so this cannot underflow.
    share_a, share_b = va / (va + vb), vb / (va + vb)
    df = 1 / (share_a**2 / (first.n - 1) + share_b**2 / (second.n - 1))
    half = student_t_quantile(0.5 + confidence / 2, df) * math.sqrt(va + vb)
    return Difference(mean, (mean - half, mean + half), confidence, df)


def student_t_quantile(probability: float, df: float) -> float:
    """The t with P(T < t) = probability for Student's distribution with `df` >= 1.

    With t = sqrt(df) tan(u) the density becomes c cos(u)^(df - 1), which Gauss-Legendre
    integrates to about ten digits; the quantile is found by bisection. (SciPy has it, but is
    a large dependency for one number.)

    Raises:
        ValueError: `probability` outside (0, 1) or `df` below 1.
    """
    if not 0 < probability < 1 or df < 1:
        raise ValueError(f"no Student quantile for probability {probability} and df {df}")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, df)
    nodes, weights = np.polynomial.legendre.leggauss(96)
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi)

    def upper_half(u: float) -> float:  # P(0 < T < sqrt(df) tan(u))
        angles = 0.5 * u * (nodes + 1)
        return 0.5 * u * float(weights @ np.exp(log_c + (df - 1) * np.log(np.cos(angles))))

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if upper_half(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(df) * math.tan(low)

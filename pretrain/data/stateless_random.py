"""Stateless randomness: hashes, permutations and uniform numbers as functions of integers.

The random numbers of a sample are computed from its position, in any process and any order. So a
run is the same for any number of workers or ranks and resumes from any step without replaying the
earlier ones; no process holds a shuffled list.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio
_ROUNDS = 6
Whole = int | np.ndarray  # an integer or an array of integers


def hash64(*parts: Whole) -> np.ndarray:
    """Hash each tuple of integers to a uint64; arrays are broadcast."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # NumPy warns for scalars only
        for part in parts:
            state = _mix(state + _GOLDEN + np.asarray(part).astype(np.uint64))
    return state


def uniform(count: int, *parts: Whole) -> np.ndarray:
    """Return `count` numbers in [0, 1) for each tuple of integers: float64 (..., count)."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN  # the counter of SplitMix64
    return (_mix(hash64(*parts)[..., None] + counters) >> np.uint64(11)) * 2.0**-53


def permute(positions: np.ndarray, n: Whole, key: np.ndarray) -> np.ndarray:
    """Map positions by the random permutation of range(n) that belongs to a key.

    A Feistel network on pairs of digits in base ceil(sqrt(n)), applied again to values outside
    range(n) (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4).

    Args:
        positions: int64, any shape, in [0, n).
        n, key: same shape as ``positions``, or scalars; `key` is uint64, see `hash64`.

    Returns:
        int64, same shape, in [0, n).
    """
    values = np.array(positions, np.uint64)
    n = np.broadcast_to(np.asarray(n, np.uint64), values.shape)
    key = np.broadcast_to(key, values.shape)
    outside = np.ones(values.shape, bool)
    while outside.any():
        base = np.maximum(1, np.ceil(np.sqrt(n[outside]))).astype(np.uint64)
        left, right = values[outside] // base, values[outside] % base
        for i in range(_ROUNDS):
            secret = (_mix(right ^ _mix(key[outside] + np.uint64(i))) >> np.uint64(32)) % base
            left, right = right, (left + secret) % base
        values[outside] = left * base + right
        outside = values >= n
    return values.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Hash uint64 values by the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashed: np.ndarray = x ^ (x >> np.uint64(31))
    return hashed

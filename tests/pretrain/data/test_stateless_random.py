"""Randomness as a function of integers: permutations are ones, and look random."""

import numpy as np
import pytest

from pretrain.data.stateless_random import hash64, permute, uniform


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 10, 100, 101, 4097])
def test_permute_takes_each_position_to_an_image_of_its_own(n):
    for seed, epoch in ((0, 0), (0, 1), (7, 0)):
        images = permute(np.arange(n), n, hash64(seed, epoch))
        assert sorted(images.tolist()) == list(range(n))
        assert (permute(np.arange(n)[::-2], n, hash64(seed, epoch)) == images[::-2]).all()
    if n >= 9:
        assert (
            permute(np.arange(n), n, hash64(0, 0)) != permute(np.arange(n), n, hash64(0, 1))
        ).any()
        assert (
            permute(np.arange(n), n, hash64(0, 0)) != permute(np.arange(n), n, hash64(1, 0))
        ).any()


def test_every_image_comes_equally_often_at_every_position():
    n, epochs = 7, 4000
    keys = hash64(5, np.arange(epochs))[:, None]
    images = permute(np.tile(np.arange(n), (epochs, 1)), n, keys)
    for first, second in ((0, 1), (2, 6)):  # pairs: also that positions are independent
        pairs = np.bincount(images[:, first] * n + images[:, second], minlength=n * n)
        pairs = pairs.reshape(n, n)[~np.eye(n, dtype=bool)]
        expected = epochs / len(pairs)
        assert ((pairs - expected) ** 2 / expected).sum() < 74.7  # chi-square, 41 d.o.f., 0.1 %


def test_a_large_permutation_has_no_order_left():
    n = 100_000
    images = permute(np.arange(n), n, hash64(0, 0))
    for lag in (1, 2, 317):  # 317 is the base of its digits
        assert abs(np.corrcoef(images[:-lag], images[lag:])[0, 1]) < 3.3 / np.sqrt(n)


def test_permutations_of_several_lengths_and_keys_can_be_asked_for_at_once():
    lengths, keys = np.array([3, 50, 50, 1, 4097]), hash64(np.arange(5), 9)
    positions = np.array([2, 49, 49, 0, 4000])
    alone = [
        int(permute(np.array([p]), n, k)[0])
        for p, n, k in zip(positions.tolist(), lengths.tolist(), keys, strict=True)
    ]
    assert permute(positions, lengths, keys).tolist() == alone


def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours():
    numbers = uniform(200, 3, 1, np.arange(500))
    assert numbers.shape == (500, 200)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, 100, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 148.3  # chi-square, 99 d.o.f., 0.1 %
    for a, b in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 3.3 / np.sqrt(a.size)


def test_numbers_depend_on_all_parts_and_on_their_order():
    rows = [uniform(4, *parts) for parts in ((0, 1), (1, 0), (0, 2), (0, 0, 1), (2**40, 1))]
    assert len({tuple(row) for row in rows}) == len(rows)
    assert (uniform(9, 7, np.array([5, 6]))[1] == uniform(9, 7, 6)).all()

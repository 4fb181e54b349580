"""kNN by votes, against loops over pairs, scikit-learn, and itself in pieces."""

import math

import numpy as np
import pytest
import torch

from pretrain.probe.accuracy import accuracy
from pretrain.probe.knn import merge, nearest, vote, weighted_knn


def clusters(n, classes, dim=6, noise=0.9, seed=0):
    """Features around a centre a class, the classes mixed, of any length."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    features = centres[labels] + noise * torch.randn(n, dim, generator=generator)
    return features * (0.5 + 5 * torch.rand(n, 1, generator=generator)), labels


def naive_knn(train, labels, test, classes, k, temperature):
    """Wu et al. 2018, section 3.4, as loops."""
    named = []
    for query in test.double().tolist():
        pairs = []
        for row, label in zip(train.double().tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, row, strict=True))
            pairs.append((dot / math.hypot(*query) / math.hypot(*row), label))
        votes = dict.fromkeys(range(classes), 0.0)
        for similarity, label in sorted(pairs, reverse=True)[:k]:
            votes[label] += math.exp(similarity / temperature)
        order = sorted(votes, key=votes.get, reverse=True)
        named.append([c if votes[c] > 0 else -1 for c in order])
    return named


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (40, 0.5), (500, 0.07)])
def test_votes_are_those_of_naive_loops_over_pairs(k, temperature):
    train, labels = clusters(60, 6)
    test, _ = clusters(25, 6, seed=1)
    named = weighted_knn(train, labels, test, num_classes=6, k=k, temperature=temperature, top=6)
    assert named.tolist() == naive_knn(train, labels, test, 6, k, temperature)


def test_at_a_high_temperature_it_is_scikit_learns_classifier_on_cosine_distance():
    sklearn = pytest.importorskip("sklearn.neighbors")
    train, labels = clusters(300, 3)
    test, _ = clusters(200, 3, seed=1)
    peer = sklearn.KNeighborsClassifier(15, metric="cosine").fit(train, labels)
    named = weighted_knn(train, labels, test, num_classes=3, k=15, temperature=1e6)
    share = torch.from_numpy(peer.predict_proba(test)).sort(1, descending=True)[0]
    clear = share[:, 0] > share[:, 1]  # where the majority is no tie
    assert clear.sum() > 180
    assert (named[clear, 0].numpy() == peer.predict(test)[clear]).all()


def test_chunks_of_any_size_change_nothing():
    train, labels = clusters(101, 4)
    test, _ = clusters(37, 4, seed=1)
    whole = weighted_knn(train, labels, test, num_classes=4, k=20)
    pieces = weighted_knn(
        train, labels, test, num_classes=4, k=20, query_chunk=5, bank_chunk=3
    )  # chunks of fewer rows than k
    assert torch.equal(whole, pieces)


def test_shares_of_the_bank_with_padding_merge_into_the_whole():
    train, labels = clusters(50, 4)
    test, _ = clusters(9, 4, seed=1)
    whole = nearest(train, labels, test, 12)
    padding, none = torch.zeros(7, 6), torch.full((7,), -1)
    shares = [
        nearest(torch.cat([train[part], padding]), torch.cat([labels[part], none]), test, 12)
        for part in (slice(0, 5), slice(5, 50))
    ]
    values, found = merge(*(torch.cat(parts, 1) for parts in zip(*shares, strict=True)), k=12)
    assert torch.allclose(values, whole[0])
    assert torch.equal(vote(values, found, 4, 0.07, 4), vote(*whole, 4, 0.07, 4))


def test_a_tiny_temperature_neither_overflows_nor_loses_the_nearest():
    train, labels = clusters(60, 6)
    test, _ = clusters(25, 6, seed=1)
    cold = weighted_knn(train, labels, test, num_classes=6, temperature=1e-4, top=1)
    nearest_one = weighted_knn(train, labels, test, num_classes=6, k=1, top=1)
    assert torch.equal(cold, nearest_one)


def test_accuracies_are_counted_by_hand():
    named = torch.tensor(
        [[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [2, 3, 4, 5, 0, 1], [5] + [-1] * 5]
    )
    result = accuracy(named, torch.tensor([0, 0, 1, 1]), ["a", "b", "c", "d", "e", "f"])
    assert result.top1 == 25.0
    assert result.top5 == 50.0  # the third names its class in the sixth place
    assert result.per_class == {"a": 50.0, "b": 0.0}  # no image of the others
    assert accuracy(named, torch.tensor([0, 0, 1, 1]), ["a", "b"]).top5 is None


def test_features_may_be_mapped_from_a_file(tmp_path):
    train, labels = clusters(64, 4)
    np.save(tmp_path / "bank.npy", train.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "bank.npy", mmap_mode="c"))
    assert torch.equal(
        weighted_knn(mapped, labels, train, num_classes=4, k=3, bank_chunk=10),
        weighted_knn(train, labels, train, num_classes=4, k=3),
    )

"""Linear classifiers on frozen features: the paper's protocol and the quick way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco_common.errors import UserError
from pretrain.data.loader import build_batches
from pretrain.data.transforms.recipes import ViewRecipe
from pretrain.probe import linear
from pretrain.probe.accuracy import accuracy
from pretrain.probe.backbone import digest
from pretrain.probe.datasets import open_labelled
from pretrain.probe.features import Features
from pretrain.probe.linear import (
    LinearProtocol,
    logistic_regression,
    quick_linear,
    rank_classes,
    train_linear,
)
from tests.pretrain.probe_data import separable, tiny_backbone, write_classes


def quiet(text):
    pass


def features(values, labels, classes=None):
    count = classes or int(labels.max()) + 1
    return Features(values, labels, tuple(f"class {i}" for i in range(count)))


def test_the_protocol_is_the_papers():
    protocol, total = LinearProtocol(), 100 * 5005  # ImageNet's steps of 256
    per_epoch = [protocol.rate(30, epoch * 5005, total) for epoch in range(100)]
    assert per_epoch == pytest.approx([30] * 60 + [3] * 20 + [0.3] * 20)
    last = [protocol.rate(30, step, total) for step in (60 * 5005 - 1, 80 * 5005 - 1, total - 1)]
    assert last == pytest.approx([30, 3, 0.3])
    assert (protocol.epochs, protocol.batch_size, protocol.weight_decay) == (100, 256, 0)
    assert tuple(protocol.rates) == (30.0,)


def test_a_training_is_sgd_on_random_crops_written_out_by_hand(tmp_path):
    """Momentum 0.9, no decay, x0.1 at 60 and 80 %: the loop with nothing of torch.optim in it."""
    images = open_labelled(str(write_classes(tmp_path / "train", 6)))
    backbone = tiny_backbone()
    protocol = LinearProtocol(rates=(2.0,), epochs=5, batch_size=6)  # 15 steps
    (head,) = train_linear(backbone, images, protocol, crop_size=32, seed=3, say=quiet)

    weight = 0.01 * torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    weight, bias = weight, torch.zeros(3)
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    view = ViewRecipe(crop_size=32, scale=(0.08, 1.0))
    batches = build_batches(images, [view], batch_size=6, seed=3, stop_step=15)
    for step, batch in enumerate(batches):
        x = backbone.forward_features(batch.views[0])
        y = F.one_hot(torch.from_numpy(images.labels)[batch.index], 3)
        error = ((x @ weight.T + bias).softmax(1) - y) / len(x)  # gradient of the cross-entropy
        speed_w, speed_b = 0.9 * speed_w + error.T @ x, 0.9 * speed_b + error.sum(0)
        lr = 2.0 * (1 if step < 9 else 0.1 if step < 12 else 0.01)
        weight, bias = weight - lr * speed_w, bias - lr * speed_b
    assert torch.allclose(head.weight, weight, atol=2e-4)
    assert torch.allclose(head.bias, bias, atol=2e-4)


def test_a_sweep_trains_each_rate_as_if_it_were_alone_and_leaves_the_backbone_alone(tmp_path):
    images = open_labelled(str(write_classes(tmp_path / "train", 4)))
    backbone = tiny_backbone()
    before = digest(backbone)

    def run(*rates):
        protocol = LinearProtocol(rates=rates, epochs=3, batch_size=5)
        return train_linear(backbone, images, protocol, crop_size=32, say=quiet)

    together = run(0.1, 30.0)
    for head, (alone,) in zip(together, (run(0.1), run(30.0)), strict=True):
        assert torch.equal(head.weight, alone.weight)
        assert torch.equal(head.bias, alone.bias)
    assert not torch.equal(together[0].weight, together[1].weight)
    assert digest(backbone) == before
    with pytest.raises(UserError, match="--lr is"):
        run()


def test_a_backbone_that_learns_meanwhile_is_caught(tmp_path):
    images = open_labelled(str(write_classes(tmp_path / "train", 4)))
    protocol = LinearProtocol(epochs=1, batch_size=6)
    with pytest.raises(RuntimeError, match="frozen backbone changed"):
        train_linear(tiny_backbone().train(), images, protocol, crop_size=32, say=quiet)


def test_images_of_a_colour_a_class_are_told_apart_by_the_papers_protocol(tmp_path):
    train = open_labelled(str(write_classes(tmp_path / "train", 12)))
    backbone = tiny_backbone()
    protocol = LinearProtocol(rates=(3.0,), epochs=12, batch_size=6)
    (head,) = train_linear(backbone, train, protocol, crop_size=32, say=quiet)
    from pretrain.probe.datasets import Preprocessing
    from pretrain.probe.features import extract

    tests = open_labelled(str(write_classes(tmp_path / "test", 5, seed=1)))
    seen = extract(backbone, tests, Preprocessing.of(32))
    assert accuracy(rank_classes(head, seen.values), seen.labels, seen.classes).top1 == 100.0


def test_five_classes_are_named_by_falling_logit():
    x = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    for classes in (7, 3):
        classifier = torch.nn.Linear(4, classes)
        order = classifier(x).argsort(1, descending=True)
        assert torch.equal(rank_classes(classifier, x, chunk=4), order[:, :5])


def test_separable_features_are_classified_without_an_error():
    train, test = (features(*separable(n, 4, seed=s)) for n, s in ((200, 0), (100, 1)))
    classifier, penalty = quick_linear(train, say=quiet)
    result = accuracy(rank_classes(classifier, test.values), test.labels, test.classes)
    assert result.top1 == 100.0
    assert penalty == 0.1  # of equally good ones the strongest


@pytest.mark.parametrize(("penalty", "in_memory"), [(1e-1, 0), (1e-3, 10**9)])
def test_the_logistic_regression_is_scikit_learns(penalty, in_memory, monkeypatch):
    monkeypatch.setattr(linear, "IN_MEMORY", in_memory)
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    values, labels = separable(150, 4)
    values = 5 + 3 * values + 2 * torch.randn(values.shape, generator=generator)
    values[:, 7] = 1.5  # a constant feature must not divide by zero
    ours = logistic_regression(features(values, labels), penalty, chunk=64)

    scale = torch.where(values.std(0, correction=0) > 0, values.std(0, correction=0), 1.0)
    standard = ((values - values.mean(0)) / scale).double().numpy()
    peer = linear_model.LogisticRegression(C=1 / (penalty * len(values)), max_iter=5000, tol=1e-8)
    peer.fit(standard, labels)
    with torch.no_grad():
        probabilities = ours(values).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, peer.predict_proba(standard), atol=2e-3)


def test_a_warm_start_reaches_the_same_minimum():
    values, labels = separable(120, 3)
    train = features(values + torch.randn(values.shape), labels)
    cold = logistic_regression(train, 1e-2)
    warm = logistic_regression(train, 1e-2, start=logistic_regression(train, 1.0))
    assert torch.allclose(cold.weight, warm.weight, atol=1e-3)


def test_the_penalty_is_chosen_without_the_test_images_and_fits_the_data():
    """Labels that hang on one feature of 60, and few images: a weak penalty learns the noise."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(90, 60, generator=generator)
    labels = (values[:, 0] + 0.3 * torch.randn(90, generator=generator) > 0).long()
    said = []
    _, penalty = quick_linear(features(values, labels), say=said.append)
    held_out = {float(line.split()[3]): float(line.split()[-2]) for line in said}
    assert held_out[penalty] == max(held_out.values())
    assert penalty >= 1e-2


def test_a_classifier_that_diverges_is_reported_by_its_learning_rate(tmp_path):
    images = open_labelled(str(write_classes(tmp_path / "train", 6)))
    said = []
    protocol = LinearProtocol(rates=(0.5, 1e5), epochs=4, batch_size=6)
    train_linear(tiny_backbone(), images, protocol, crop_size=32, seed=3, say=said.append)
    (warning,) = [text for text in said if "warning" in text]
    assert "diverged at the learning rate 100000 (loss " in warning
    assert "above the loss of chance (1.1)" in warning
    assert "0.5" not in warning

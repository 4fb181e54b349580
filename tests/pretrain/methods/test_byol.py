"""BYOL against its Section 3.1 written naively."""

import copy
import math

import pytest
import torch

from pretrain.engine.train_step import TrainStep
from pretrain.methods.byol import target_momentum
from pretrain.solver.optimizers import build_optimizer
from tests.pretrain import tiny


def test_a_step_is_that_of_section_3_1():
    method, cfg = tiny.build("byol")
    with torch.no_grad():  # a target of its own, or the average could not be seen
        for p in method.target.parameters():
            p.mul_(1.1)
    naive = copy.deepcopy(method)
    step, lr = 1, 0.05
    loss = TrainStep(method, build_optimizer(cfg, method), total_steps=tiny.STEPS)(
        tiny.views("byol", step), tiny.index(step), step, lr
    )["loss"]

    v, w = tiny.views("byol", step)
    expected = 0.0
    for online, other in ((v, w), (w, v)):
        prediction, target = naive.predictor(naive.encoder_q(online)), naive.target(other).detach()
        for p, z in zip(prediction, target, strict=True):
            cosine = (p @ z) / (p.norm() * z.norm())
            expected = expected + (2 - 2 * cosine) / tiny.BATCH
    torch.testing.assert_close(loss, expected.detach())
    expected.backward()
    with torch.no_grad():
        for p in [*naive.encoder_q.parameters(), *naive.predictor.parameters()]:
            p -= lr * (p.grad + 1e-4 * p)
        tau = 1 - (1 - 0.9) * (math.cos(math.pi * step / tiny.STEPS) + 1) / 2
        for xi, theta in zip(naive.target.parameters(), naive.encoder_q.parameters(), strict=True):
            xi.copy_(tau * xi + (1 - tau) * theta)
    for (name, p), q in zip(method.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9, msg=name)


def test_only_the_online_network_and_the_predictor_are_trained():
    method, _ = tiny.build("byol", "MODEL.SYNC_BN", True)
    method(tiny.views("byol", 0), 0, tiny.index(0))["loss"].backward()
    for name, p in method.named_parameters():
        assert (p.grad is None) == name.startswith("target."), name
        assert p.requires_grad != name.startswith("target."), name


def test_the_targets_momentum_rises_from_its_base_to_one_by_half_a_cosine():
    taus = [target_momentum(0.996, step, 1000) for step in range(1001)]
    assert taus[0] == pytest.approx(0.996)
    assert taus[250] == pytest.approx(1 - 0.004 * (2 + math.sqrt(2)) / 4)  # slow at first
    assert taus[500] == pytest.approx(0.998)
    assert taus[1000] == 1.0
    assert taus == sorted(taus)

"""LARS against the paper's Algorithm 1 in loops and against lightly; what decays and what not."""

import pytest
import torch
from lightly.utils import lars as lightlys
from torch import nn

from moco_common.errors import UserError
from pretrain.config.defaults import get_defaults
from pretrain.modeling.resnet import ResNet
from pretrain.solver.optimizers import LARS, build_optimizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()


def config(optimizer="lars"):
    cfg = get_defaults()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.WEIGHT_DECAY = optimizer, 0.1
    cfg.SOLVER.BASE_LR, cfg.SOLVER.TRUST_COEFFICIENT = 0.5, 0.02
    return cfg


def run(net, optimizer, rates):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for lr in rates:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


class NaiveLARS:
    """Algorithm 1 of You et al. 2017, element by element; vectors by plain momentum."""

    def __init__(self, net):
        self.parameters, self.param_groups = list(net.parameters()), [{}]
        self.velocities = [[0.0] * p.numel() for p in self.parameters]

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for p, velocity in zip(self.parameters, self.velocities, strict=True):
            w, g = p.flatten().tolist(), p.grad.flatten().tolist()
            decay = 0.1 if p.dim() > 1 else 0.0
            local = 1.0
            if p.dim() > 1:
                w_norm, g_norm = sum(x * x for x in w) ** 0.5, sum(x * x for x in g) ** 0.5
                local = 0.02 * w_norm / (g_norm + decay * w_norm)
            for i in range(len(w)):
                velocity[i] = 0.9 * velocity[i] + lr * local * (g[i] + decay * w[i])
                p.view(-1)[i] -= velocity[i]


def test_lars_is_the_papers_algorithm_while_the_learning_rate_changes():
    rates = [0.1, 0.5, 0.4, 0.2, 0.05]
    ours, naive = network(), network()
    torch.testing.assert_close(
        run(ours, build_optimizer(config(), ours), rates), run(naive, NaiveLARS(naive), rates)
    )


def test_lars_is_lightlys_at_a_constant_learning_rate():
    ours, theirs = network(), network()
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1]},
        {"params": [p for p in theirs.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    oracle = lightlys.LARS(
        groups, lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.02, eps=0.0
    )
    torch.testing.assert_close(
        run(ours, build_optimizer(config(), ours), [0.5] * 5), run(theirs, oracle, [0.5] * 5)
    )


def test_lars_goes_on_bit_for_bit_from_its_state():
    whole, broken = network(), network()
    expected = run(whole, build_optimizer(config(), whole), [0.5, 0.4, 0.3, 0.2])
    first = build_optimizer(config(), broken)
    run(broken, first, [0.5, 0.4])
    second = build_optimizer(config(), broken)
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(run(broken, second, [0.3, 0.2]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_zero_weights_and_zero_gradients_are_not_scaled_and_absent_ones_not_touched():
    zero = nn.Parameter(torch.zeros(2, 2))
    still = nn.Parameter(torch.ones(2, 2))
    absent = nn.Parameter(torch.ones(2, 2))
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero, still, absent], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1))
    torch.testing.assert_close(still.detach(), torch.full((2, 2), 1 - 0.1 * 0.5))
    assert torch.equal(absent.detach(), torch.ones(2, 2))


def test_lars_spares_bn_and_biases_and_sgd_spares_none():
    net = ResNet(18, width=1 / 16, head=lambda features: nn.Linear(features, 4))
    net.layer4.requires_grad_(False)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    weights, vectors = build_optimizer(config(), net).param_groups
    names = {id(p): name for name, p in trained.items()}
    spared = {names[id(p)] for p in vectors["params"]}
    assert spared == {name for name in trained if "bn" in name or name.endswith(".bias")} | {
        name for name in trained if "downsample.1" in name
    }
    assert len(spared) + len(weights["params"]) == len(trained)
    assert (vectors["weight_decay"], vectors["scaled"]) == (0.0, False)
    assert (weights["weight_decay"], weights["scaled"]) == (0.1, True)
    (group,) = build_optimizer(config("sgd"), net).param_groups
    assert len(group["params"]) == len(trained)
    assert group["weight_decay"] == 0.1


def test_an_unknown_optimiser_is_refused_with_the_names():
    with pytest.raises(UserError, match="choose one of sgd, lars"):
        build_optimizer(config("adam"), network())

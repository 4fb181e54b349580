"""MoCo's parts against plain oracles, and one process against several.

`test_algorithm1` holds the whole of it against the paper's pseudo-code.
"""

import copy
import math
from collections import deque
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco_common import comm
from moco_common.errors import UserError
from pretrain import distributed
from pretrain.methods.components import embedding_spread
from pretrain.methods.moco import MoCo
from pretrain.modeling.batch_norm import SplitBatchNorm1d, SplitBatchNorm2d
from pretrain.modeling.heads import linear_head, mlp_head
from pretrain.modeling.resnet import ResNet
from tests.pretrain.ranks import on_ranks

DIM, BATCH, PIXELS = 8, 16, 32


def tiny_moco(bn_groups=1, queue_size=23, mlp=False, **kwargs):
    torch.manual_seed(3)
    norm = partial(SplitBatchNorm1d, groups=bn_groups)
    head = mlp_head(DIM, batch_norm=norm) if mlp else linear_head(DIM)
    build = partial(ResNet, 18, width=1 / 16, bn_groups=bn_groups, head=head)
    method = MoCo(build, dim=DIM, queue_size=queue_size, momentum=0.9, seed=7, **kwargs)
    return method.double()  # BN over groups of four images amplifies rounding in float32


def images(step):
    """Two views of a global batch: (2, BATCH, 3, PIXELS, PIXELS)."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(2, BATCH, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)


def run(steps, bn_groups, mlp=False):
    """Some SGD steps on this rank's share; what must not depend on the number of ranks."""
    method = tiny_moco(bn_groups, mlp=mlp)
    parallel = distributed.wrap(method)
    optimizer = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad],
        lr=0.05,
        momentum=0.9,
        weight_decay=1e-4,
    )
    share = BATCH // comm.world_size()
    losses = []
    for step in range(steps):
        mine = images(step)[:, comm.rank() * share :][:, :share]
        loss = parallel(list(mine), step, torch.arange(len(mine[0])))["loss"]
        optimizer.zero_grad()
        loss.backward()
        gradients = {
            name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None
        }
        optimizer.step()
        mean = loss.detach().clone()
        distributed.all_reduce_mean([mean])
        losses.append(mean)
    distributed.average_batch_norm(method)
    result = {"losses": torch.stack(losses), "gradients": gradients, "state": method.state_dict()}
    if comm.world_size() > 1:
        result["broadcasts buffers"] = parallel.broadcast_buffers
    return result


def test_one_process_with_groups_equals_as_many_processes():
    alone = on_ranks(1, run, 2, 2, True)[0]
    for result in on_ranks(2, run, 2, 1, True):
        assert not result.pop("broadcasts buffers")  # the queue is the same everywhere already
        torch.testing.assert_close(result, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("queue_size", [1, 5, 6, 7, 12, 40])
def test_the_queue_is_a_ring_for_any_size_and_batch(queue_size):
    method = tiny_moco(queue_size=queue_size)
    oracle = deque(method.queue.clone().unbind(), maxlen=queue_size)
    for batch in (6, 1, 6, 5, 9, 41):
        keys = torch.randn(batch, DIM, dtype=torch.float64)
        method.enqueue(keys)
        oracle.extend(keys.unbind())
        start = int(method.queue_ptr)
        oldest_first = torch.cat([method.queue[start:], method.queue[:start]])
        assert torch.equal(oldest_first, torch.stack(list(oracle)))


def test_momentum_moves_parameters_by_one_minus_m_and_leaves_bn_buffers():
    method = tiny_moco()
    before = copy.deepcopy(method.encoder_k.state_dict())
    with torch.no_grad():
        for p in method.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    method.encoder_q.bn1.running_mean.fill_(5.0)
    method.update_key_encoder()
    parameters = {name for name, _ in method.encoder_q.named_parameters()}
    for name, value in method.encoder_k.state_dict().items():
        expected = before[name]
        if name in parameters:
            expected = 0.9 * expected + 0.1 * method.encoder_q.state_dict()[name]
        torch.testing.assert_close(value, expected)


def test_no_gradient_reaches_the_key_encoder_or_the_queue():
    method = tiny_moco()
    method(list(images(0)), 0, torch.arange(len(images(0)[0])))["loss"].backward()
    assert all(p.grad is None for p in method.encoder_k.parameters())
    assert all(p.grad is not None for p in method.encoder_q.parameters())
    assert not method.queue.requires_grad


def test_the_first_loss_is_near_chance():
    method = tiny_moco(queue_size=4096, temperature=1.0)
    outputs = method(list(images(0)), 0, torch.arange(len(images(0)[0])))
    assert method.chance_loss == math.log(4097)
    assert outputs["loss"].item() == pytest.approx(math.log(4097), rel=0.1)


def test_shuffling_changes_which_images_share_bn_statistics_and_nothing_else():
    grouped, whole = tiny_moco(bn_groups=4), tiny_moco(bn_groups=1)
    view = images(0)[1]
    with torch.no_grad():
        shuffled = grouped.encode_keys(view, 0)
        grouped.shuffle = False
        plain = grouped.encode_keys(view, 0)
        same = whole.encode_keys(view, 0)  # one group: no permutation can change anything
        whole.shuffle = False
        torch.testing.assert_close(same, whole.encode_keys(view, 0), rtol=1e-9, atol=1e-9)
    assert (shuffled - plain).abs().max() > 1e-3


class Company(nn.Module):
    """Sees nothing of an image but the BN statistics of those it is normalised with: beside eight
    of its pixels stands a constant, and what BN makes of that is the embedding."""

    def __init__(self, groups):
        super().__init__()
        self.norm = SplitBatchNorm2d(DIM, groups)
        self.scale = nn.Parameter(torch.ones(()))  # something to follow

    def forward(self, x):
        pixels = x.flatten(1)[:, :DIM, None, None]
        return self.scale * self.norm(torch.cat([pixels, torch.ones_like(pixels)], 2))[:, :, 1, 0]


def test_an_encoder_of_nothing_but_its_company_finds_its_key_only_without_shuffling():
    accuracy = {}
    for shuffle in (True, False):
        method = MoCo(partial(Company, 4), dim=DIM, queue_size=64, shuffle=shuffle).double()
        found = []
        for step in range(24):
            view = images(step)[0]
            outputs = method([view, view], step, torch.arange(BATCH))
            if step >= 64 / BATCH:  # the queue is keys of other companies
                found.append(outputs["accuracy"].item())
        accuracy[shuffle] = sum(found) / len(found)
    assert accuracy[False] == 1.0
    assert accuracy[True] < 0.5  # other companies share an image or two with the query's


def test_spread_is_zero_for_collapsed_and_one_for_opposite_embeddings():
    collapsed = F.normalize(torch.ones(5, 3), dim=1)
    assert embedding_spread(collapsed).item() == pytest.approx(0.0, abs=1e-3)
    opposite = torch.cat([torch.eye(3), -torch.eye(3)])
    assert embedding_spread(opposite).item() == pytest.approx(1.0)


@pytest.mark.parametrize("kwargs", [{"queue_size": 0}, {"momentum": 1.5}, {"temperature": 0.0}])
def test_an_impossible_setting_names_its_key(kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs)).upper()):
        MoCo(lambda: nn.Linear(1, 1), **kwargs)

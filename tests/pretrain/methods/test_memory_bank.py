"""The memory bank against a dictionary of keys, its negatives, its shards."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from moco_common import comm
from moco_common.errors import UserError
from pretrain import distributed
from pretrain.methods.memory_bank import ShardedBank
from tests.pretrain import tiny
from tests.pretrain.ranks import on_ranks


def test_three_steps_are_those_of_a_dictionary_of_keys():
    method, _ = tiny.build("memory-bank")
    encoder = copy.deepcopy(method.encoder_q)
    bank = dict(enumerate(method.bank.shard.double().clone()))
    for step in range(3):
        views, index = tiny.views("memory-bank", step), tiny.index(step)
        candidates, chosen = method.draw(index, step)
        negatives = candidates[chosen].tolist()
        loss = method(views, step, index)["loss"]
        q = F.normalize(encoder(views[0]), dim=1)
        expected = 0.0
        for i, image in enumerate(index.tolist()):
            positive = torch.exp(q[i] @ bank[image] / 0.2)
            others = sum(torch.exp(q[i] @ bank[j] / 0.2) for j in negatives)
            expected = expected - torch.log(positive / (positive + others)) / tiny.BATCH
        torch.testing.assert_close(loss, expected)
        old = dict(bank)
        for i, image in enumerate(index.tolist()):  # of an image seen twice the later row stays
            bank[image] = F.normalize(0.5 * old[image] + 0.5 * q[i].detach(), dim=0)
        torch.testing.assert_close(method.bank.shard, torch.stack(list(bank.values())))


def test_three_steps_of_nce_are_those_of_its_binary_decisions():
    """Wu et al. 2018, Eq. 3 to 7, with Z from the first step's negatives."""
    method, _ = tiny.build("memory-bank", "BANK.LOSS", "nce")
    encoder = copy.deepcopy(method.encoder_q)
    bank = dict(enumerate(method.bank.shard.double().clone()))
    z, n, m = None, tiny.IMAGES, 20
    for step in range(3):
        views, index = tiny.views("memory-bank", step), tiny.index(step)
        candidates, chosen = method.draw(index, step)
        negatives = candidates[chosen].tolist()
        outputs = method(views, step, index)
        q = F.normalize(encoder(views[0]), dim=1)
        if z is None:
            exponentials = [torch.exp(v @ bank[j] / 0.2).item() for v in q for j in negatives]
            z = n * sum(exponentials) / len(exponentials)

        expected = 0.0
        for v, image in zip(q, index.tolist(), strict=True):
            for j in (image, *negatives):
                p = torch.exp(v @ bank[j] / 0.2) / z
                h = p / (p + m / n)
                expected = expected - torch.log(h if j == image else 1 - h) / tiny.BATCH
        torch.testing.assert_close(outputs["loss"], expected)
        torch.testing.assert_close(
            torch.autograd.grad(outputs["loss"], list(method.encoder_q.parameters())),
            torch.autograd.grad(expected, list(encoder.parameters())),
            rtol=1e-6,
            atol=1e-9,
        )
        old = dict(bank)
        for i, image in enumerate(index.tolist()):
            bank[image] = F.normalize(0.5 * old[image] + 0.5 * q[i].detach(), dim=0)
    assert method.log_mean.item() == pytest.approx(math.log(z / n))


def test_the_chance_loss_of_nce_is_that_of_keys_that_look_alike():
    method, _ = tiny.build("memory-bank", "BANK.LOSS", "nce", "MOCO.TEMPERATURE", 1e4)
    loss = method(tiny.views("memory-bank", 0), 0, tiny.index(0))["loss"]
    assert method.chance_loss == pytest.approx(math.log(21) + 20 * math.log(21 / 20))
    assert loss.item() == pytest.approx(method.chance_loss, rel=1e-3)


def test_another_loss_is_refused():
    with pytest.raises(UserError, match="BANK.LOSS is 'hinge': choose softmax or nce"):
        tiny.build("memory-bank", "BANK.LOSS", "hinge")


def test_negatives_are_never_of_the_batch_never_twice_and_all_equally_likely():
    method, _ = tiny.build("memory-bank", "BANK.NEGATIVES", 10)
    index = tiny.index(0)
    counts = torch.zeros(tiny.IMAGES)
    draws = 600
    for step in range(draws):
        candidates, chosen = method.draw(index, step)
        drawn = candidates[chosen]
        assert len(drawn) == len(drawn.unique()) == 10
        counts[drawn] += 1
    free = [i for i in range(tiny.IMAGES) if i not in index.tolist()]
    assert counts[index].sum() == 0
    expected = draws * 10 / len(free)
    assert (counts[free] - expected).abs().max() < 5 * math.sqrt(expected)
    for first, second in zip(method.draw(index, 7), method.draw(index, 7), strict=True):
        assert torch.equal(first, second)


def test_only_the_first_view_is_asked_for():
    method, _ = tiny.build("memory-bank")
    assert method.num_views == 1
    assert method(tiny.views("memory-bank", 0)[:1], 0, tiny.index(0))["loss"].isfinite()


def shards():
    bank = ShardedBank(7, 3, seed=1)
    everything = torch.arange(7)
    noise = bank.rows(everything)
    whole = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    bank.set_extra_state(whole)
    bank.write(torch.tensor([6, 0, 6, 3]), torch.arange(12.0).view(4, 3))
    refused = False
    try:
        bank.get_extra_state()
    except RuntimeError:
        refused = True
    bank.gather()
    saved = bank.get_extra_state() if comm.rank() == 0 else torch.empty(0)
    asked = torch.tensor([5, 6, 5, 0])
    own = distributed.all_reduce_sum(torch.tensor(len(bank.held(asked))))
    return [noise, whole, bank.rows(asked), saved, torch.tensor([refused, len(bank.shard)]), own]


def test_a_sharded_bank_is_the_whole_one_and_is_saved_as_such():
    alone = on_ranks(1, shards)[0]
    saved = alone[1].clone()
    saved[0], saved[3], saved[6] = (torch.arange(12.0).view(4, 3)[row] for row in (1, 3, 2))
    torch.testing.assert_close(alone[3], saved)
    torch.testing.assert_close(alone[2], saved[[5, 6, 5, 0]])
    for rank, (noise, _, rows, whole, (refused, length), own) in enumerate(on_ranks(2, shards)):
        assert torch.equal(noise, alone[0])
        assert torch.equal(rows, alone[2])
        assert torch.equal(whole, saved) or rank > 0
        assert (bool(refused), int(length)) == (rank == 0, 4)  # half of seven, rounded up
        assert int(own) == 4


def noise_of_a_large_bank():
    """Of more rows than are drawn at once, so that a rank keeps parts of some draws only."""
    return ShardedBank(140_001, 2, seed=1).rows(torch.arange(140_001))


def test_the_noise_of_a_large_bank_does_not_depend_on_the_number_of_ranks():
    (alone,) = on_ranks(1, noise_of_a_large_bank)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(140_001))
    assert len(alone.unique(dim=0)) > 139_000
    for rank in on_ranks(2, noise_of_a_large_bank):
        assert torch.equal(rank, alone)


def test_a_checkpoint_of_other_data_is_refused():
    with pytest.raises(UserError, match="holds 40 keys of 8 numbers, but the data has 39 images"):
        ShardedBank(39, 8, seed=0).set_extra_state(torch.zeros(40, 8))

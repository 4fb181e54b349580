"""What a method reports beside its loss, and what it shows of its memory, against plain loops."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from moco_common.errors import UserError
from pretrain.methods import METHODS, method_class
from pretrain.methods.base import REMEDIES, Run
from pretrain.methods.components import positive_temperature
from pretrain.methods.pixpro import PixPro
from tests.pretrain import tiny

WITH_ACCURACY = ("moco", "end-to-end", "memory-bank", "simclr", "swav", "dense-cl")
OWN_OUTPUTS = {
    "dense-cl": {"dense_accuracy"},
    "pixpro": {"overlap"},
    "slot-con": {"overlap", "slots"},
    "supervised": {"top1"},
}


def first_embeddings(method, views):
    """Embeddings of the first view (SimCLR: of both), by the encoder before the step."""
    if hasattr(method, "encode"):  # SwAV encodes all views of a size in one pass
        return method.encode(views)[0]
    if "bn_groups" in vars(method):
        return F.normalize(method.encoder_q(torch.cat(views)), dim=1)
    outputs = method.encoder_q(views[0])
    if isinstance(method, PixPro):
        outputs = outputs[1]  # the dense projections
    elif isinstance(outputs, tuple):
        outputs = outputs[0]
    rows = outputs.permute(0, 2, 3, 1).flatten(0, 2) if outputs.dim() == 4 else outputs
    return F.normalize(rows, dim=1)


def take(method, name, step):
    """The outputs of a step on its views."""
    where = (tiny.places(name, step),) if method.uses_places else ()
    return method(tiny.views(name, step), step, tiny.index(step), *where)


@pytest.mark.parametrize("name", METHODS)
def test_spread_is_the_distance_of_the_embeddings_from_their_mean(name):
    method, _ = tiny.build(name)
    before = copy.deepcopy(method)
    outputs = take(method, name, 0)
    z = first_embeddings(before, tiny.views(name, 0)).detach()
    squares = [(row - z.mean(0)).square().sum() for row in z]
    torch.testing.assert_close(outputs["spread"], torch.stack(squares).mean().sqrt())
    assert 0 < outputs["spread"] < 1
    assert outputs["loss"].requires_grad
    assert not any(value.requires_grad for key, value in outputs.items() if key != "loss")
    own = OWN_OUTPUTS.get(name, set())
    assert own <= {*outputs} <= {"loss", "spread", "accuracy", "queue_fill"} | own


def nearest(scores, positive):
    """Share of rows whose largest score is that of its positive."""
    return sum(row.argmax() == at for row, at in zip(scores, positive, strict=True)) / len(scores)


def scores_of(name, method, views, index):
    """Similarities and the positive of each query of the second step."""
    rows = torch.arange(tiny.BATCH)
    if name == "moco":
        q, k = first_embeddings(method, views), method.encode_keys(views[1], 1)
        return torch.cat([q @ method.queue.T, (q * k).sum(1, keepdim=True)], 1), rows * 0 + len(
            method.queue
        )
    if name == "dense-cl":
        q, k = first_embeddings(method, views), F.normalize(method.encoder_k(views[1])[0], dim=1)
        scores = torch.cat([q @ method.queue.T, (q * k).sum(1, keepdim=True)], 1)
        return scores, rows * 0 + len(method.queue)
    if name == "end-to-end":
        q = first_embeddings(method, views)
        return q @ F.normalize(method.encoder_k(views[1]), dim=1).T, rows
    if name == "memory-bank":
        q, (candidates, chosen) = first_embeddings(method, views), method.draw(index, 1)
        negatives = candidates[chosen]
        positive = (q * method.bank.shard[index]).sum(1, keepdim=True)
        return torch.cat([positive, q @ method.bank.shard[negatives].T], 1), rows * 0
    if name == "simclr":
        z = F.normalize(method.encoder_q(torch.cat(views)), dim=1)
        others = (z @ z.T).fill_diagonal_(-2)
        return others, torch.cat([rows + tiny.BATCH, rows])
    z = method.encode(views)
    with torch.no_grad():
        scores = method.prototypes(z)
        return scores[0], method.codes(z[:2], scores[:2], 1)[1].argmax(1)


@pytest.mark.parametrize("name", WITH_ACCURACY)
def test_accuracy_is_the_share_of_queries_that_find_their_key(name):
    override = ("MOCO.SHUFFLE_BN", False, "MOCO.MOMENTUM", 1.0, "MOCO.QUEUE_SIZE", 3)
    method, _ = tiny.build(name, *override)
    for step in range(2):
        before = copy.deepcopy(method)
        outputs = method(tiny.views(name, step), step, tiny.index(step))
    with torch.no_grad():
        expected = nearest(*scores_of(name, before, tiny.views(name, 1), tiny.index(1)))
    assert 0 < expected < 1
    assert outputs["accuracy"].item() == pytest.approx(expected.item())


def test_the_fill_of_a_queue_and_of_a_bank_grows_with_the_images_to_one():
    for name, size in (("moco", 40), ("memory-bank", tiny.IMAGES)):
        method, _ = tiny.build(name, "MOCO.QUEUE_SIZE", 40)
        fills = [
            method(tiny.views(name, step), step, tiny.index(step))["queue_fill"].item()
            for step in range(3)
        ]
        assert fills == pytest.approx([16 / size, 32 / size, 1.0])


def test_the_queues_memory_is_what_has_been_written_and_names_a_wrong_pointer():
    method, _ = tiny.build("moco", "MOCO.QUEUE_SIZE", 40)
    noise = method.queue.clone()
    for step in range(3):
        memory = method.memory(step, 16)
        assert (memory.size, memory.filled) == (40, min(40, 16 * step))
        assert torch.equal(memory.vectors, method.queue[: memory.filled])
        assert not (memory.vectors == noise[: memory.filled]).all(1).any()
        assert memory.pointer == 16 * step % 40
        assert (memory.momentum, memory.notes) == (method.momentum, ())
        assert "MOCO.MOMENTUM" in memory.stale
        method(tiny.views("moco", step), step, tiny.index(step))
    assert method.memory(3, 16).pointer == 8
    (note,) = method.memory(2, 16).notes
    assert "pointer is at 8, but 2 steps of 16 keys leave it at 32" in note


def test_the_banks_memory_is_the_rows_that_differ_from_the_noise():
    method, _ = tiny.build("memory-bank")
    assert method.memory(0, 16).filled == 0
    method(tiny.views("memory-bank", 0), 0, tiny.index(0))
    seen = tiny.index(0).unique()
    memory = method.memory(1, 16)
    assert (memory.size, memory.filled) == (tiny.IMAGES, len(seen))
    torch.testing.assert_close(memory.vectors, method.bank.shard[seen].float())
    assert (memory.pointer, memory.momentum) == (None, None)


def test_swavs_memory_is_the_queue_of_both_views_without_what_is_unwritten():
    assert tiny.build("swav", "SWAV.QUEUE_SIZE", 0)[0].memory(0, 16) is None
    method, _ = tiny.build("swav")
    assert method.memory(0, 16).filled == 0
    method(tiny.views("swav", 0), 0, tiny.index(0))
    memory = method.memory(1, 16)
    assert (memory.size, memory.filled) == (21, 16)
    assert torch.equal(memory.vectors, method.queue[:, :16].flatten(0, 1))
    assert torch.equal(method.cluster_centres(), method.prototypes.weight)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_how_many_views_and_images_it_needs_and_what_helps(name):
    method, cfg = tiny.build(name)
    needed = {"memory-bank": 20 + tiny.BATCH}.get(name, 1)
    assert method_class(name).fewest_images(cfg) == needed
    assert method.num_views == {"memory-bank": 1, "supervised": 1, "swav": None}.get(name, 2)
    assert method.remedies.keys() == REMEDIES.keys()
    with_memory = ("moco", "dense-cl", "memory-bank", "swav")
    assert (method.memory(0, 16) is not None) == (name in with_memory)
    assert (method.cluster_centres() is None) == (name not in ("swav", "slot-con"))
    queue = cfg.MOCO.QUEUE_SIZE
    settling = {"moco": queue, "dense-cl": queue, "memory-bank": tiny.IMAGES}
    assert method.settling_images == settling.get(name, 0)


@pytest.mark.parametrize(("negatives", "fits"), [(1, True), (24, True), (0, False), (25, False)])
def test_the_bank_draws_at_most_the_images_beside_the_batch(negatives, fits):
    if fits:
        method, _ = tiny.build("memory-bank", "BANK.NEGATIVES", negatives)
        candidates, chosen = method.draw(torch.arange(tiny.BATCH), 0)
        drawn = candidates[chosen]
        assert len(drawn.unique()) == negatives
        assert drawn.min() >= tiny.BATCH
    else:
        with pytest.raises(UserError, match="leave 24 to draw from: .* from 1 to 24"):
            tiny.build("memory-bank", "BANK.NEGATIVES", negatives)


def test_a_bank_of_fewer_images_than_a_batch_is_one_sentence():
    cfg = tiny.config("memory-bank", "SOLVER.BATCH_SIZE", tiny.IMAGES)
    with pytest.raises(UserError, match="needs more images than a batch of 40, but the data"):
        method_class("memory-bank").from_config(cfg, Run(40, 3, 1))


@pytest.mark.parametrize("value", [0.0, -0.1])
def test_a_temperature_is_above_zero(value):
    assert positive_temperature("K", 1e-9) == 1e-9
    with pytest.raises(UserError, match="K is .*above 0"):
        positive_temperature("K", value)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("moco", 40 + 1),
        ("end-to-end", tiny.BATCH),
        ("memory-bank", 20 + 1),
        ("simclr", 2 * tiny.BATCH - 1),
        ("swav", 12),
    ],
)
def test_the_loss_of_chance_is_the_logarithm_of_the_number_of_choices(name, choices):
    method, _ = tiny.build(name, "MOCO.QUEUE_SIZE", 40)
    assert method.chance_loss == pytest.approx(math.log(choices))
    assert tiny.build("byol")[0].chance_loss is None

"""What is noticed before a state is saved."""

import ast

import pytest
import torch

from moco_common import comm
from moco_common.errors import UserError
from pretrain import distributed
from pretrain.checkpoint import consistency as guards
from pretrain.engine.metrics import Scalars
from tests.pretrain.ranks import on_ranks

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 70001), (65536, 2)])
def test_a_digest_changes_with_any_one_bit_and_with_the_order(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(shape, generator=generator) * 200 - 50).clamp_min(0).to(dtype)
    before = guards.digest(x)
    assert guards.digest(x.clone()) == before
    for place in {0, x.numel() // 2, x.numel() - 1}:
        changed = x.clone()
        changed.view(-1).view(torch.uint8)[place * x.element_size()] ^= 1
        assert guards.digest(changed) != before, place
    if x.numel() > 1:
        assert guards.digest(x.flip(0)) != before
        assert guards.digest(x.flatten().roll(1).view(shape)) != before


@pytest.mark.parametrize(
    ("one", "other"), [(0, 1), (5, 1023), (0, 1024), (1030, 3000), (2047, 2048)]
)
def test_a_digest_changes_when_two_words_change_places(one, other):
    x = torch.randn(3001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    swapped = x.clone()
    swapped[[one, other]] = x[[other, one]]
    assert guards.digest(swapped) != guards.digest(x)


def test_a_digest_does_not_depend_on_the_memory_format():
    x = torch.randn(8, 3, 5, 5)
    assert guards.digest(x) == guards.digest(x.to(memory_format=torch.channels_last))


def test_a_tensor_that_is_not_finite_is_named():
    state = {"a": torch.ones(2), "count": torch.tensor(3), "b": torch.zeros(2, 2)}
    guards.check_finite(state, 7)
    for value in (float("nan"), float("inf"), -float("inf")):
        state["b"][1, 0] = value
        with pytest.raises(UserError, match="^b is not finite after iteration 7"):
            guards.check_finite(state, 7)


def differ():
    """What three ranks are told of a state in which rank 2 has another pointer, then rank 1 a queue
    in another order; and of losses of which one is infinite."""
    rank, messages = comm.rank(), []
    queue = torch.arange(20.0).view(5, 4)
    pointer = torch.tensor([4 if rank == 2 else 3])
    for state in (
        {"queue": queue, "queue_ptr": torch.tensor([3])},
        {"queue": queue, "queue_ptr": pointer},
        {"queue": queue.flip(0) if rank == 1 else queue, "queue_ptr": torch.tensor([3])},
    ):
        try:
            guards.check_same_on_all_ranks(state, 7)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    scalars = Scalars()
    for step in range(4):
        scalars.add({"loss": torch.tensor(float(step + rank)), "spread": torch.tensor(0.5)})
    scalars.settle(4)
    scalars.add({"loss": torch.tensor(10.0 + rank), "spread": torch.tensor(1.5)})
    scalars.settle(5)
    messages.append(str(scalars.take()))
    for step in range(5, 9):
        loss = float("inf") if (step, rank) == (7, 1) else 1.0
        scalars.add({"loss": torch.tensor(loss), "spread": torch.tensor(0.5)})
    try:
        scalars.settle(9)
    except UserError as error:
        messages.append(str(error))
    messages.append("|".join(distributed.all_gather_text("ä" * rank)))
    return messages


def test_all_ranks_hear_what_differs_and_which_step_was_not_finite():
    first, *others = on_ranks(3, differ)
    assert others == [first, first]
    same, pointer, queue, means, infinite, texts = first
    assert same == ""
    assert pointer.startswith("queue_ptr differs between rank 2 and rank 0 after iteration 7")
    assert queue.startswith("queue differs between rank 1 and rank 0 after iteration 7")
    # Means over steps and ranks: 0..3 (+ 1) and 11; spread 4 x 0.5 and 1.5.
    assert ast.literal_eval(means) == pytest.approx({"loss": (2.5 * 4 + 11) / 5, "spread": 0.7})
    assert infinite.startswith("The loss is inf at iteration 8:")
    assert texts == "|ä|ää"

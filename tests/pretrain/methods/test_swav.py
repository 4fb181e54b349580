"""SwAV against lightly's loss on its own embeddings; prototypes, multi-crop and queue."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import SwaVLoss

from pretrain.engine.train_step import TrainStep
from pretrain.solver.optimizers import build_optimizer
from tests.pretrain import tiny


def test_loss_and_gradients_are_lightlys_with_multi_crop_and_queue():
    method, _ = tiny.build("swav")
    past = []
    for step in range(3):
        naive = copy.deepcopy(method)
        method.zero_grad()
        loss = method(tiny.views("swav", step), step, tiny.index(step))["loss"]
        loss.backward()

        centres = F.normalize(naive.prototypes.weight.detach(), dim=1).requires_grad_()
        large, small = tiny.views("swav", step)[:2], tiny.views("swav", step)[2:]
        z = [*naive.encoder_q(torch.cat(large)).chunk(2)]
        z = [F.normalize(x, dim=1) for x in [*z, *naive.encoder_q(torch.cat(small)).chunk(2)]]
        scores = [x @ centres.T for x in z]
        # The queue holds 21 embeddings a view, the newest first: used as soon as it is full.
        queue = None
        if step == 2:
            queue = [torch.cat([past[1][v], past[0][v]])[:21] @ centres.T for v in range(2)]
        expected = SwaVLoss(0.1, 3, 0.05)(scores[:2], scores[2:], queue).squeeze()
        expected.backward()
        past.append([x.detach() for x in z[:2]])
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(method.prototypes.weight.grad, centres.grad)
        for p, q in zip(method.encoder_q.parameters(), naive.encoder_q.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)


def test_prototypes_have_length_one_and_stand_still_while_frozen():
    method, cfg = tiny.build("swav", "SWAV.FREEZE_ITERS", 2)
    take = TrainStep(method, build_optimizer(cfg, method), total_steps=tiny.STEPS)
    before, moved = F.normalize(method.prototypes.weight.detach(), dim=1), []
    for step in range(3):
        take(tiny.views("swav", step), tiny.index(step), step, 0.05)
        after = method.prototypes.weight.detach()
        moved.append(not torch.allclose(after, before))
    assert moved == [False, False, True]
    method(tiny.views("swav", 3), 3, tiny.index(3))
    torch.testing.assert_close(
        method.prototypes.weight.norm(dim=1), torch.ones(12, dtype=torch.float64)
    )


@pytest.mark.parametrize("small", [0, 2])
def test_views_of_one_size_take_one_pass_of_the_encoder(small):
    method, _ = tiny.build("swav")
    shapes = []
    method.encoder_q.register_forward_hook(lambda _, images, __: shapes.append(images[0].shape))
    method(tiny.views("swav", 0)[: 2 + small], 0, tiny.index(0))
    assert [tuple(shape) for shape in shapes] == [(32, 3, 32, 32), (32, 3, 16, 16)][
        : 1 + small // 2
    ]


def test_the_queue_waits_for_its_step():
    alone = tiny.build("swav", "SWAV.QUEUE_SIZE", 0)[0]
    waiting = tiny.build("swav", "SWAV.QUEUE_START_ITER", 3)[0]
    for step in range(4):
        views, index = tiny.views("swav", step), tiny.index(step)
        same = torch.equal(alone(views, step, index)["loss"], waiting(views, step, index)["loss"])
        assert same == (step < 3)

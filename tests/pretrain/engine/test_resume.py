"""State that a resumed run restores and that no later result shows by itself."""

import torch

from pretrain.checkpoint import format as checkpoint
from pretrain.engine.resume import capture, restore
from pretrain.engine.train_step import TrainStep
from pretrain.solver.optimizers import build_optimizer
from tests.pretrain import tiny


def test_a_resumed_run_draws_the_random_numbers_that_come_next(tmp_path):
    method, cfg = tiny.build("moco")
    take_step = TrainStep(method, build_optimizer(cfg, method), total_steps=tiny.STEPS)
    torch.manual_seed(11)
    state = capture(method, take_step, config=cfg.dump(), step=1, images=tiny.IMAGES, data={})
    checkpoint.save(state, tmp_path)
    expected = torch.rand(5)
    torch.manual_seed(12)
    assert restore(cfg, tmp_path, method, take_step, tiny.IMAGES, {}) == (1, [])
    assert torch.equal(torch.rand(5), expected)

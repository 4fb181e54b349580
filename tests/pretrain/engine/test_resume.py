"""State that a resumed run restores, and files that no run has written."""

import pytest
import torch

from moco_common.config import MAX_VALUES
from moco_common.errors import UserError
from pretrain.checkpoint import format as checkpoint
from pretrain.engine.resume import Restored, capture, check_readable, restore
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
    assert restore(cfg, tmp_path, method, take_step, tiny.IMAGES, {}) == Restored(1, [])
    assert torch.equal(torch.rand(5), expected)


@pytest.fixture
def saved():
    """A run after a step, and its state."""
    method, cfg = tiny.build("moco")
    take_step = TrainStep(method, build_optimizer(cfg, method), total_steps=tiny.STEPS)
    views = [x.float() for x in tiny.views("moco", 0)]
    method.float()
    take_step(views, tiny.index(0), 0, 0.1)
    state = capture(method, take_step, config=cfg.dump(), step=1, images=tiny.IMAGES, data={})
    return cfg, method, take_step, state


ANYTHING = (None, "x", -1, 1.5, [], {}, [[]], {"torch": 1}, True, torch.zeros(2, 2), 2**70)


def test_a_configuration_too_large_to_be_read_again_is_one_sentence(saved, tmp_path):
    cfg, method, take_step, state = saved
    checkpoint.save(state, tmp_path)
    cfg = cfg.clone()
    cfg.DATA = ["x"] * MAX_VALUES
    with pytest.raises(UserError, match=r"^the configuration is too large .*as DATA\.$"):
        restore(cfg, tmp_path, method, take_step, tiny.IMAGES, {})
    with pytest.raises(UserError, match="more than .* values"):
        check_readable(cfg.dump())
    cfg.DATA = ["x"] * 1000
    assert check_readable(cfg.dump())["DATA"] == cfg.DATA


PARTS = ("config", "state_dict", "optimizer", "step", "images", "ranks", "data", "scaler")


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_with_a_part_of_another_type_is_one_sentence(
    saved, tmp_path, part, monkeypatch
):
    cfg, method, take_step, state = saved
    checkpoint.save(state, tmp_path)
    others = {key: value for key, value in state.items() if key != part}
    crafted = [{**others, part: value} for value in ANYTHING] + [others]
    errors = []
    for content in crafted:
        monkeypatch.setattr(checkpoint, "load", lambda _, content=content: content)
        try:
            restore(cfg, tmp_path, method, take_step, tiny.IMAGES, {})
        except UserError as error:
            errors.append(str(error))
    assert all(str(tmp_path) in error and len(error) < 800 for error in errors)
    # A float32 run reads no scaler; earlier versions wrote no data, and {} is as good.
    fine = {"scaler": len(crafted), "data": 3}.get(part, 0)
    assert len(errors) >= len(crafted) - fine


@pytest.mark.parametrize(
    "damage",
    [
        lambda o: o["param_groups"].clear(),
        lambda o: o["param_groups"][0].update(params=[0]),
        lambda o: o["param_groups"][0].pop("params"),
        lambda o: o["state"].update({0: 3}),
        lambda o: o["state"].update({0: {"momentum_buffer": "x"}}),
        lambda o: o["state"].update({0: {"momentum_buffer": torch.zeros(3)}}),
        lambda o: o.update(state=5),
        lambda o: o.update(param_groups=5),
    ],
)
def test_an_optimisers_state_that_does_not_fit_is_one_sentence(saved, tmp_path, damage):
    cfg, method, take_step, state = saved
    damage(state["optimizer"])
    checkpoint.save(state, tmp_path)
    with pytest.raises(UserError, match="does not fit this run"):
        restore(cfg, tmp_path, method, take_step, tiny.IMAGES, {})


def test_the_optimisers_settings_are_those_of_the_resumed_run(saved, tmp_path):
    """SOLVER may be changed on resume; the momentum buffers are the checkpoint's."""
    _, method, take_step, state = saved
    checkpoint.save(state, tmp_path)
    _, changed = tiny.build("moco", "SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.MOMENTUM", 0.25)
    resumed = TrainStep(method, build_optimizer(changed, method), total_steps=tiny.STEPS)
    notes = restore(changed, tmp_path, method, resumed, tiny.IMAGES, {}).notes
    assert any("SOLVER.WEIGHT_DECAY was 0.0001 and is now 0.5" in note for note in notes)
    (group,) = resumed.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.25)
    ours = [s["momentum_buffer"] for s in resumed.optimizer.state.values()]
    theirs = [s["momentum_buffer"] for s in take_step.optimizer.state.values()]
    assert len(ours) > 10
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

"""The schedule for another batch, against the rule written out by hand."""

import pytest

from moco_common.errors import UserError
from moco_det.config.defaults import flatten
from moco_det.config.key_descriptions import explanation, meaning
from moco_det.config.protocols import load_config
from moco_det.config.schedule_scaling import scale_schedule


def scaled(*overrides, workers=1, protocol="VOC"):
    cfg = load_config(protocol, overrides)
    return scale_schedule(cfg, load_config(protocol), overrides[::2], workers)


def solver(cfg):
    s = cfg.SOLVER
    return s.IMS_PER_BATCH, round(s.BASE_LR, 9), s.MAX_ITER, tuple(s.STEPS), s.WARMUP_ITERS


def test_the_protocols_batch_changes_nothing_on_any_number_of_processes():
    for workers in (1, 2, 8, 16):
        cfg, lines = scaled(workers=workers)
        assert solver(cfg) == (16, 0.02, 24_000, (18_000, 22_000), 100)
        assert lines == []


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 32])
def test_length_is_inverse_and_learning_rate_proportional_to_the_batch(batch):
    """Images seen, and learning rate per image, stay as they are."""
    cfg, lines = scaled("SOLVER.IMS_PER_BATCH", str(batch))
    found, lr, length, steps, warmup = solver(cfg)
    assert found == batch
    assert lr == pytest.approx(0.02 * batch / 16)
    assert length * batch == 24_000 * 16
    assert [step * batch for step in steps] == [18_000 * 16, 22_000 * 16]
    assert warmup * batch == 100 * 16
    assert {line.split()[0] for line in lines} == {
        "SOLVER.BASE_LR",
        "SOLVER.MAX_ITER",
        "SOLVER.STEPS",
        "SOLVER.WARMUP_ITERS",
        "TEST.PRECISE_BN.NUM_ITER",
    }


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 7, 16, 48, 5000])
def test_precise_bn_sees_as_many_images_whatever_the_batch(batch):
    """The protocol's 200 batches of 16, in whole batches, said together with the batch."""
    cfg, lines = scaled("SOLVER.IMS_PER_BATCH", str(batch))
    images = cfg.TEST.PRECISE_BN.NUM_ITER * batch
    assert 3_200 <= images < 3_200 + batch
    assert any(line.startswith("TEST.PRECISE_BN.NUM_ITER 200 -> ") for line in lines) == (
        batch != 16
    )
    told = [line for line in explanation(cfg)[2:] if "PRECISE_BN" in line]
    assert all(line.endswith(meaning("SOLVER.IMS_PER_BATCH").changed) for line in told)


def test_precise_bn_keeps_what_the_user_sets_and_that_is_a_deviation():
    own = ("SOLVER.IMS_PER_BATCH", "4", "TEST.PRECISE_BN.NUM_ITER", "50")
    cfg, lines = scaled(*own)
    assert cfg.TEST.PRECISE_BN.NUM_ITER == 50
    assert not any("PRECISE_BN" in line for line in lines)
    (told,) = [line for line in explanation(cfg)[2:] if "PRECISE_BN" in line]
    assert told.startswith("TEST.PRECISE_BN.NUM_ITER 200 -> 50: The BN statistics come from")


@pytest.mark.parametrize("batch", ["0", "-4"])
def test_an_empty_batch_is_refused(batch):
    with pytest.raises(UserError, match=f"IMS_PER_BATCH must be at least 1, not {batch}"):
        scaled("SOLVER.IMS_PER_BATCH", batch)


def test_what_the_user_sets_is_not_scaled():
    cfg, lines = scaled(
        "SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.01", "SOLVER.WARMUP_ITERS", "7"
    )
    assert solver(cfg) == (4, 0.01, 96_000, (72_000, 88_000), 7)
    assert not any("BASE_LR" in line or "WARMUP" in line for line in lines)


def test_a_shorter_run_keeps_the_fractions_of_its_steps_and_a_warm_up_of_a_tenth():
    cfg, _ = scaled("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "800")
    assert solver(cfg) == (4, 0.005, 800, (600, 733), 80)
    cfg, _ = scaled("SOLVER.MAX_ITER", "12000")
    assert solver(cfg) == (16, 0.02, 12_000, (9_000, 11_000), 100)
    cfg, _ = scaled("SOLVER.MAX_ITER", "800", "SOLVER.STEPS", "(400,)")
    assert cfg.SOLVER.STEPS == (400,)
    assert scaled("SOLVER.MAX_ITER", "2")[0].SOLVER.STEPS == (1,)


def test_a_run_without_iterations_leaves_steps_and_warm_up_as_they_are():
    assert solver(scaled("SOLVER.MAX_ITER", "0")[0]) == (16, 0.02, 0, (18_000, 22_000), 100)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100])
def test_steps_are_increasing_and_inside_the_run_whatever_its_length(length):
    cfg, _ = scaled("SOLVER.MAX_ITER", str(length))
    steps = cfg.SOLVER.STEPS
    assert list(steps) == sorted(set(steps))
    assert all(0 < step < length for step in steps)


def test_reference_world_size_is_detectron2s_own_rule():
    """Two images a process, as on the reference's eight: two processes train on four."""
    cfg, _ = scaled("SOLVER.REFERENCE_WORLD_SIZE", "8", workers=2)
    assert solver(cfg) == (4, 0.005, 96_000, (72_000, 88_000), 400)
    assert cfg.TEST.PRECISE_BN.NUM_ITER == 800
    with pytest.raises(UserError, match="16 cannot be divided among SOLVER.REFERENCE_WORLD_SIZE 3"):
        scaled("SOLVER.REFERENCE_WORLD_SIZE", "3", workers=2)


def test_nothing_but_the_schedule_is_touched():
    cfg, _ = scaled("SOLVER.IMS_PER_BATCH", "4")
    before, after = flatten(load_config("VOC")), flatten(cfg)
    assert {k for k in before if before[k] != after[k]} == {
        *("SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.MAX_ITER"),
        *("SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "TEST.PRECISE_BN.NUM_ITER"),
    }

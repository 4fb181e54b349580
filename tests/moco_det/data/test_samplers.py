"""Which image comes when is a function of the seed and the position, and of nothing else."""

import itertools
import random
from collections import Counter

import cv2
import numpy as np
import pytest
import torch

from moco_common.errors import UserError
from moco_det.config.protocols import load_config
from moco_det.data.samplers import (
    PRECISE_BN,
    TRAINING,
    MicroBatches,
    TrainingSet,
    numbers,
    seed_model,
    share,
)


def micro_batches(groups, batch_size, wanted, **kwargs):
    kwargs = {"seed": 1, "sequence": TRAINING, **kwargs}
    return list(MicroBatches(groups, batch_size, numbers=wanted, **kwargs))


def images(batches):
    return [image for batch in batches for _, image in batch]


def test_every_image_comes_once_an_epoch_in_another_order_each_time():
    order = images(micro_batches([0] * 6, 3, range(4)))
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert order[:6] != order[6:]
    positions = [at for batch in micro_batches([0] * 6, 3, range(4)) for at, _ in batch]
    assert positions == list(range(12))


def test_groups_are_batched_apart_and_nothing_is_lost():
    """Oracle: two queues, filled by hand in the order of the ungrouped sequence."""
    groups = [0, 1, 0, 0, 1, 0, 0]
    found = micro_batches(groups, 2, range(9))
    plain = images(micro_batches([0] * 7, 1, range(40)))
    queues, expected = {0: [], 1: []}, []
    for image in plain:
        queue = queues[groups[image]]
        queue.append(image)
        if len(queue) == 2:
            expected.append(tuple(queue))
            queue.clear()
    assert [tuple(image for _, image in batch) for batch in found] == expected[:9]


@pytest.mark.parametrize("groups", [[0] * 5, [0, 1, 1, 0, 0]])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(groups):
    whole = micro_batches(groups, 2, range(20))
    for start in (1, 7, 19):
        assert micro_batches(groups, 2, range(start, 20)) == whole[start:]


def test_passes_of_few_processes_see_what_one_pass_of_many_sees():
    groups = [0, 1, 1, 0, 0, 1, 0]

    def by_iteration(processes, passes):
        found = [[] for _ in range(3)]
        for rank in range(processes):
            wanted = numbers(2, 5, passes=passes, rank=rank, world_size=processes)
            for k, batch in enumerate(micro_batches(groups, 2, wanted)):
                found[k // passes].append(batch)
        return [sorted(batches) for batches in found]

    assert by_iteration(4, 1) == by_iteration(1, 4) == by_iteration(2, 2)


def test_seeds_and_sequences_have_their_own_order():
    orders = {
        tuple(images(micro_batches([0] * 30, 5, range(6), seed=seed, sequence=sequence)))
        for seed, sequence in itertools.product((1, 2), (TRAINING, PRECISE_BN))
    }
    assert len(orders) == 4


def test_an_image_comes_as_often_as_its_repeat_factor_says():
    repeats = np.array([1.0, 1.5, 3.0])
    found = Counter(images(micro_batches([0] * 3, 1, range(5500), repeats=repeats)))
    assert found[2] / found[0] == pytest.approx(3, rel=0.01)
    assert found[1] / found[0] == pytest.approx(1.5, rel=0.05)


def draw(record):
    """As Detectron2's augmentations do: from the global generators."""
    if record["file_name"] == "broken.jpg":
        raise OSError("image file is truncated\n(3 bytes not processed)")
    return {
        **record,
        "drawn": (random.random(), np.random.rand(), torch.rand(1).item()),
    }


def some_images(count=5, broken=()):
    names = ["broken.jpg" if i in broken else f"{i}.jpg" for i in range(count)]
    records = [{"file_name": name} for name in names]
    return TrainingSet(records, None, np.zeros(count, int))


def drawn(batches):
    return [(n, [(r["file_name"], r["drawn"]) for r in batch]) for n, batch in batches]


def test_what_is_drawn_for_an_image_does_not_depend_on_workers_or_on_the_start():
    def batches(start, workers):
        wanted = range(start, 8)
        return drawn(
            some_images().batches(
                draw, 2, seed=3, sequence=TRAINING, numbers=wanted, num_workers=workers
            )
        )

    here = batches(0, 0)
    assert batches(0, 3) == here
    torch.rand(1), random.random(), np.random.rand()
    assert batches(5, 2) == here[5:]
    assert len({sample for _, batch in here for _, sample in batch}) == 16  # all different


def test_the_global_generators_are_left_as_they_were():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    drawn(some_images().batches(draw, 2, seed=3, sequence=TRAINING, numbers=range(3)))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_a_model_draws_by_seed_and_number():
    def drawn_for(*key):
        seed_model(*key)
        return torch.rand(1).item(), np.random.rand(), random.random()

    assert drawn_for(1, TRAINING, 5) == drawn_for(1, TRAINING, 5)
    keys = [(1, TRAINING, 5), (2, TRAINING, 5), (1, PRECISE_BN, 5), (1, TRAINING, 6)]
    assert len({drawn_for(*key) for key in keys}) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_in_one_line(workers):
    batches = some_images(broken=[3]).batches(
        draw, 1, seed=3, sequence=TRAINING, numbers=range(9), num_workers=workers
    )
    with pytest.raises(UserError, match=r"^cannot read broken.jpg: image file is truncated \(3"):
        list(batches)


def test_a_bug_on_a_sound_image_is_not_called_damage(tmp_path):
    def mapper(record):
        raise ValueError("a bug of ours")

    cv2.imwrite(str(tmp_path / "sound.png"), np.zeros((4, 4, 3), np.uint8))
    records = [{"file_name": str(tmp_path / "sound.png")}]
    training_set = TrainingSet(records, None, np.array([1]))
    with pytest.raises(ValueError, match="a bug of ours"):
        list(training_set.batches(mapper, 1, seed=3, sequence=TRAINING, numbers=range(1)))


def test_a_batch_that_cannot_be_shared_is_refused():
    cfg = load_config("VOC", ["SOLVER.ACCUMULATION_STEPS", "4"])
    assert (share(cfg, 1), share(cfg, 2), share(cfg, 4)) == (4, 2, 1)
    with pytest.raises(UserError, match="16 cannot be shared by 3 processes with .* 4.*of 12"):
        share(cfg, 3)
    cfg.SOLVER.ACCUMULATION_STEPS = 0
    with pytest.raises(UserError, match="at least 1"):
        share(cfg, 1)

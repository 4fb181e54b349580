"""The monitor speaks once, in time, and stays silent about healthy runs."""

import math

import pytest

from pretrain.config.defaults import load_config
from pretrain.engine.health_monitor import Monitor, patience
from pretrain.methods import METHODS, build_method
from pretrain.methods.base import REMEDIES

CHANCE = 6.93


def feed(loss, accuracy, spread, steps=10, chance=CHANCE, remedies=REMEDIES):
    monitor = Monitor(chance, patience=100, remedies=remedies)
    said = [monitor.observe(40 * i, loss, spread, accuracy) for i in range(steps)]
    return [text for text in said if text], said


def test_collapse_is_told_once_with_cause_and_only_after_patience():
    texts, said = feed(CHANCE, 0.001, 0.01)
    assert len(texts) == 1
    assert "collapsed" in texts[0]
    assert "6.93" in texts[0]
    assert said[:3] == [None, None, None]


def test_a_plateau_with_spread_embeddings_has_another_cause():
    texts, _ = feed(CHANCE, 0.001, 0.8)
    assert len(texts) == 1
    assert "views" in texts[0]


def test_a_leak_is_told_with_its_usual_causes():
    texts, _ = feed(0.01, 0.999, 0.9)
    assert len(texts) == 1
    assert "MIN_SCALE" in texts[0]


def test_where_no_loss_is_chance_the_spread_tells_a_collapse():
    texts, said = feed(0.0, 0.0, 0.01, chance=None)
    assert len(texts) == 1
    assert "collapsed" in texts[0]
    assert said[:3] == [None, None, None]
    assert feed(0.0, 0.0, 0.5, chance=None)[0] == []


def test_a_healthy_run_hears_nothing():
    assert feed(5.2, 0.4, 0.8)[0] == []


def recipe(method):
    narrow = "MODEL.DEPTH 18 MODEL.WIDTH 0.0625 SOLVER.BATCH_SIZE 8 MOCO.QUEUE_SIZE 40"
    few = "BANK.NEGATIVES 20 SWAV.PROTOTYPES 12 MODEL.BN_GROUPS 1 MODEL.SYNC_BN False"
    few += " SUPERVISED.CLASSES 3"
    return load_config("moco-v2" if method == "moco" else method, f"{narrow} {few}".split())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_helps_in_keys_that_it_has(method):
    cfg = recipe(method)
    built = build_method(cfg, num_images=70, total_steps=10)
    assert built.remedies.keys() == REMEDIES.keys()
    chance = built.chance_loss
    texts = [
        *feed(chance or 0.0, 0.0, 0.0, chance=chance, remedies=built.remedies)[0],
        *feed(CHANCE, 0.0, 0.9, remedies=built.remedies)[0],
        *feed(0.0, 1.0, 0.9, remedies=built.remedies)[0],
    ]
    assert len(texts) == 3
    for text in texts:
        for key in (word.strip("(),.:;") for word in text.split() if "_" in word):
            section, _, name = key.partition(".")
            assert name in cfg[section], f"{method}: {key}"


@pytest.mark.parametrize(("method", "images"), [("moco", 40), ("memory-bank", 70), ("simclr", 0)])
def test_patience_is_as_long_as_what_has_to_settle(method, images):
    built = build_method(recipe(method), num_images=70, total_steps=10)
    assert built.settling_images == images
    assert patience(8000, 8) == 2 * math.ceil(8000 / 8)
    assert patience(images, 8) == 200

"""The monitor speaks once, in time, and stays silent about healthy runs."""

from pretrain.monitor import Monitor

CHANCE = 6.93


def feed(loss, accuracy, spread, steps=10):
    monitor = Monitor(CHANCE, patience=100)
    said = [monitor.observe(40 * i, loss, accuracy, spread) for i in range(steps)]
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
    assert "SHUFFLE_BN" in texts[0]


def test_a_healthy_run_hears_nothing():
    assert feed(5.2, 0.4, 0.8)[0] == []

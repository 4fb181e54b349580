"""How a preview's ranking is compared with the full schedule's, against scipy and by hand."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence.jobs import Job
from benchmarks.preview import (
    FULL,
    agreement,
    backbones,
    chance,
    collect,
    document,
    fine_tunings,
    parser,
)
from moco_common.errors import UserError
from moco_det.config.protocols import load_config


@pytest.mark.parametrize("seed", range(6))
def test_agreement_is_kendalls_tau_b_and_spearmans_rho(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 8, (2, 9)) if seed % 2 else rng.random((2, 9))  # with and without ties
    pairs = list(itertools.combinations(range(9), 2))
    agreeing = sum(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs)
    untied = math.prod(sum(v[i] != v[j] for i, j in pairs) for v in (a, b))
    ranks = [[(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v] for v in (a, b)]
    found = agreement({str(i): {"short": [a[i]], FULL: [b[i]]} for i in range(9)}, "short")
    assert found["tau"] == pytest.approx(agreeing / math.sqrt(untied))
    assert found["rho"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_chance_is_the_share_of_orders_that_agree_as_well():
    """Of 4! orders one agrees wholly; scipy's exact one-sided p-value is the same share."""
    assert chance([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1 / 24)
    a, b = [1, 2, 3, 4, 5], [2, 1, 3, 5, 4]
    expected = stats.kendalltau(a, b, method="exact", alternative="greater").pvalue
    assert chance(a, b) == pytest.approx(expected)
    assert chance([1, 1, 2], [5, 6, 7]) == pytest.approx(2 / 6)  # the tied two may change places
    assert chance(range(12), range(12)) <= 1e-3  # drawn, not counted


def test_only_backbones_with_both_fine_tunings_are_ranked():
    scores = {
        "a": {FULL: [1.0, 3.0], "short": [0.5]},
        "b": {FULL: [4.0], "short": [0.1]},
        "c": {FULL: [9.0], "short": [0.9]},
        "d": {FULL: [5.0]},
    }
    found = agreement(scores, "short")
    assert found["n"] == 3
    assert found["tau"] == pytest.approx(1 / 3)
    assert agreement(scores, "10pct") == {"n": 0, "tau": None, "rho": None, "p": None}
    text = document({"AP": scores}, ["short", "10pct"])
    assert "| AP | short | 3 | 0.33 | 0.50 |" in text
    assert "| AP | 10pct | 0 | - | - | - |" in text
    assert "| a | 0.5 | - | 2.0 ± 1.4 |" in text


def test_every_backbone_is_fine_tuned_alike_but_for_labels_and_length(tmp_path):
    args = parser().parse_args(["--output", str(tmp_path), "--iterations", "500", "--seeds", "2"])
    like = tmp_path / "moco-5.pkl"
    named = {"moco-5": like, "random": None}
    jobs = fine_tunings(args, named, ("voc:a:train", "voc:a:test"), like)
    assert len(jobs) == 2 * 4 * 2
    full, quick = (jobs["moco-5", v, 1].commands[0] for v in (FULL, "1pct"))
    differing = {(a, b) for a, b in zip(full, quick, strict=True) if a != b}
    assert {d for d in differing if "/" not in d[0]} == {("1.0", "0.01"), ("500", "50")}
    untrained = jobs["random", FULL, 1].commands[0]
    assert untrained[untrained.index("--config") + 1] == "scenes-random"
    assert untrained[untrained.index("MODEL.ARCHITECTURE_FROM") + 1] == str(like)
    load_config("scenes", quick[quick.index("SEED") :])  # keys and values that exist
    done = jobs["moco-5", FULL, 0].done
    done.write_text(json.dumps({"bbox": {"AP": 7.5, "AP50": None}}))
    assert collect(jobs, "AP") == {"moco-5": {FULL: [7.5]}}
    assert collect(jobs, "AP50") == {"moco-5": {FULL: [0.0]}}
    assert isinstance(jobs["moco-5", FULL, 0], Job)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--weights", "a.pkl"], "--weights needs data: pass --data"),
        (["--weights", "random", "--data", "x", "y"], "add a converted file"),
        (["--weights", "x/a.pkl", "y/a.pkl", "--data", "x", "y"], "have the same name"),
    ],
)
def test_what_cannot_be_ranked_is_said(given, said, tmp_path):
    with pytest.raises(UserError, match=said):
        backbones(parser().parse_args([*given, "--output", str(tmp_path)]))

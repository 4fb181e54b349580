"""What is counted and found odd among the tensors of a file."""

import math

import pytest
import torch

from moco_common.backbone.accounting import Entry, dropped, odd_values, summary
from moco_det.conversion.account import Report

ENTRIES = [
    Entry("a", (2, 3), target="x"),
    Entry("bb", (), reason="head"),
    Entry("c", (1,), reason="training state"),
    Entry("d", (1,), reason="head"),
]


def report(encoders=("backbone",), prefix="", **more):
    return Report(
        "MoCo", encoders[0], prefix, encoders, "ResNet-50", "detectron2", ENTRIES, [], **more
    )


def test_tensors_are_counted_by_what_became_of_them():
    assert dropped(ENTRIES) == {"head": 2, "training state": 1}
    assert summary(ENTRIES, "loaded") == ("4 read, 1 loaded, 3 dropped (2 head, 1 training state)")
    assert summary(ENTRIES[:1], "loaded") == "1 read, 1 loaded, 0 dropped"
    assert (report().mapped, report().dropped) == (1, {"head": 2, "training state": 1})


def test_the_table_has_a_line_for_each_tensor():
    assert report().table().splitlines() == [
        "a   2x3              -> x",
        "bb  scalar           dropped: head",
        "c   1                dropped: training state",
        "d   1                dropped: head",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "the backbone encoder\n"),
        ({"prefix": "net."}, "the backbone encoder under 'net.'\n"),
        ({"encoders": ("query", "key")}, "the query encoder, one of query and key\n"),
    ],
)
def test_a_report_names_the_encoder_and_the_others_if_there_are_any(options, words):
    assert f"source        MoCo, {words}" in str(report(**options))
    assert "proof         not requested" in str(report(**options))
    assert "note          a note" in str(report(**options, notes=["a note"]))


def norm(name, mean, var):
    return {f"{name}.running_mean": torch.tensor(mean), f"{name}.running_var": torch.tensor(var)}


def test_odd_values_are_named_and_sound_ones_are_not():
    assert (
        odd_values({"a.weight": torch.ones(2), "n": torch.tensor(0)} | norm("b", [1.0], [1.0]))
        == []
    )
    assert odd_values({"a.bias": torch.zeros(2)}) == []
    assert odd_values({"a.weight": torch.zeros(2)}) == ["all-zero weights in a.weight"]
    broken = {"a.weight": torch.tensor([0.0, math.nan, math.inf]), "b": torch.ones(1)}
    assert odd_values(broken) == ["NaN or infinite values in a.weight (2 of 3)"]
    never = norm("b", [0.0, 0.0], [1.0, 1.0])
    moved = norm("c", [0.0, 0.1], [1.0, 1.0]) | norm("d", [0.0, 0.0], [1.0, 0.9])
    assert odd_values(moved) == []
    assert odd_values(never | moved) == [
        "running statistics of 1 of 3 norms were never updated (mean 0, variance 1): b"
    ]


@pytest.mark.parametrize(
    ("count", "words"),
    [(3, "w0.weight, w1.weight, w2.weight"), (4, "w0.weight, w1.weight, w2.weight and 1 more")],
)
def test_at_most_three_names_are_listed(count, words):
    zeros = {f"w{i}.weight": torch.zeros(1) for i in range(count)}
    assert odd_values(zeros) == [f"all-zero weights in {words}"]

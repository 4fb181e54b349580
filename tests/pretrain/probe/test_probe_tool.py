"""`tools/probe.py` from the command line to its report."""

import json

import numpy as np
import pytest
import torch

from pretrain.checkpoint import format as checkpoint
from pretrain.config.defaults import load_config
from pretrain.methods import build_method
from tests.pretrain.probe.test_knn import naive_knn
from tests.pretrain.probe_data import write_classes
from tools.probe import main

TINY = "MODEL.DEPTH 18 MODEL.WIDTH 0.0625 INPUT.CROP_SIZE 32 MOCO.DIM 8 MOCO.QUEUE_SIZE 20".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    write_classes(root / "train", 10)
    write_classes(root / "test", 4, seed=1)
    return root


def our_checkpoint(path):
    cfg = load_config("moco-v2", TINY)
    torch.manual_seed(0)
    method = build_method(cfg, num_images=30, total_steps=1)
    with torch.no_grad():
        method.encoder_k.conv1.weight.zero_()  # what must not be taken
    content = {"format": checkpoint.FORMAT, "config": cfg.dump(), "step": 1}
    torch.save({**content, "state_dict": method.state_dict()}, path)
    return method


def run(*words):
    return main([str(word) for word in (*words, "--workers", "2")])


def test_a_checkpoint_is_measured_in_all_ways_and_the_report_lies_beside_it(data, tmp_path, capsys):
    our_checkpoint(tmp_path / "run.pth")
    words = ["--train", data / "train", "--test", data / "test", "--quick", "--linear"]
    words += ["--lr", "1", "3", "--epochs", "4", "--batch-size", "8"]
    assert run(tmp_path / "run.pth", *words) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "run_probe.json").read_text())
    assert report["classes"] == ["amber", "blue", "green"]
    assert report["preprocessing"] == {"crop_size": 32, "resize": 37}  # of the pre-training
    assert (report["train"]["images"], report["test"]["images"]) == (30, 12)
    assert report["knn"]["k"] == 30  # of 200, as many as there are
    assert report["knn"]["top5"] is None
    assert [row["rates"] for row in report["linear"]] == [1.0, 3.0]
    for measured in (report["knn"], report["quick_linear"], *report["linear"]):
        mean = sum(measured["per_class"].values()) / 3  # 4 test images a class
        assert measured["top1"] == pytest.approx(mean)
        assert f"top-1 {measured['top1']:.2f} %" in said
    assert report["quick_linear"]["top1"] == 100.0
    best = max(report["linear"], key=lambda row: row["held_out"]["top1"])
    assert {row["held_out"]["images"] for row in report["linear"]} == {3}  # one a class
    assert f"top-1 {best['top1']:.2f} % at the learning rate {best['rates']:g}" in said
    assert "blue" in said
    assert not report["bn_fitted"]
    stored = tmp_path / "run_probe_features"
    assert sorted(p.name for p in stored.glob("*.npy")) == ["test.npy", "train.npy"]


def test_the_votes_are_the_papers_unless_told_otherwise(tmp_path):
    """k 200 and T 0.07 of Wu et al. 2018, top-1 and top-5, from what the features' file holds."""
    shades = {f"{i}": (110 + 5 * i, 120, 150 - 5 * i) for i in range(7)}
    write_classes(tmp_path / "train", 40, colours=shades)
    write_classes(tmp_path / "test", 9, seed=1, colours=shades)
    our_checkpoint(tmp_path / "run.pth")
    assert (
        run(*(tmp_path / "run.pth", "--train", tmp_path / "train", "--test", tmp_path / "test"))
        == 0
    )
    knn = json.loads((tmp_path / "run_probe.json").read_text())["knn"]
    assert (knn["k"], knn["T"]) == (200, 0.07)
    bank, tests = (
        torch.from_numpy(np.load(tmp_path / "run_probe_features" / f"{name}.npy"))
        for name in ("train", "test")
    )
    named = naive_knn(bank, torch.arange(280) // 40, tests, 7, 200, 0.07)
    for key, most in (("top1", 1), ("top5", 5)):
        right = [i // 9 in classes[:most] for i, classes in enumerate(named)]
        assert knn[key] == pytest.approx(100 * sum(right) / 63)
    assert knn["top1"] < knn["top5"]


def test_the_query_encoder_and_an_exported_file_of_it_are_the_same_backbone(data, tmp_path):
    method = our_checkpoint(tmp_path / "run.pth")
    state = {k: v for k, v in method.encoder_q.state_dict().items() if not k.startswith("fc")}
    torch.save(state, tmp_path / "exported.pth")
    words = ["--train", data / "train", "--no-cache", "--crop-size", "32"]
    assert run(tmp_path / "run.pth", *words) == run(tmp_path / "exported.pth", *words) == 0
    ours, exported = (
        json.loads((tmp_path / f"{name}_probe.json").read_text()) for name in ("run", "exported")
    )
    assert ours["weights_sha256"] == exported["weights_sha256"]
    assert ours["knn"] == exported["knn"]
    assert (ours["train"]["images"], ours["test"]["images"]) == (24, 6)
    assert "0.2 of" in ours["test"]["spec"]
    assert not list(tmp_path.glob("*_features"))


def test_random_weights_are_seeded_and_their_bn_is_fitted_unless_forbidden(data, tmp_path):
    words = ["random", "--config", "moco-v2", "--train", data / "train", "--no-cache"]
    digests, fitted = [], []
    for i, more in enumerate(([], [], ["--seed", "1"], ["--no-fit-bn"])):
        assert run(*words, *more, "-o", tmp_path / f"{i}.json", *TINY) == 0
        report = json.loads((tmp_path / f"{i}.json").read_text())
        digests.append(report["weights_sha256"])
        fitted.append(report["bn_fitted"])
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert fitted == [True, True, True, False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.pth"], "nowhere.pth does not exist"),
        (["random"], "need an architecture: pass --config"),
        (["random", "--config", "moco-v3"], "did you mean moco-v2"),
        (["random", "--config", "moco-v2", "-k", "0"], "-k is 0"),
        (["random", "--config", "moco-v2", "--test", "elsewhere"], "elsewhere does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_status(data, capsys, words, message):
    assert run(*words, "--train", data / "train", "--no-cache") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_converted_file_is_read_as_the_converter_writes_it(data, tmp_path):
    convert = pytest.importorskip("tools.convert").main
    our_checkpoint(tmp_path / "run.pth")
    out = tmp_path / "run_torchvision.pth"
    assert not convert([str(tmp_path / "run.pth"), "--to", "torchvision", "-o", str(out)])
    words = ["--train", data / "train", "--no-cache", "--crop-size", "32"]
    assert run(out, *words) == run(tmp_path / "run.pth", *words) == 0
    ours, theirs = (
        json.loads((tmp_path / f"{name}_probe.json").read_text())
        for name in ("run", "run_torchvision")
    )
    assert ours["knn"] == theirs["knn"]

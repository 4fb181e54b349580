"""`tools/inspect_run.py`: tiny runs of every method, and what may be wrong with one."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
import yaml

from pretrain.checkpoint import format as checkpoint
from pretrain.engine.train_loop import train
from pretrain.inspection.dictionary import dictionary_of
from pretrain.inspection.run_directory import open_run
from pretrain.methods import METHODS
from tests.pretrain.probe_data import write_classes
from tests.pretrain.tiny import recipe
from tools.inspect_run import main

RECIPE = {"moco": "moco-v2"}
STEPS, BATCH = 6, 8
OWN_PICTURES = {
    "dense-cl": ["correspondences.png"],
    "pixpro": ["correspondences.png"],
    "slot-con": ["slots.png"],
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("photographs") / "classes", 5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, photographs):
    """A run of six steps of each method, made when it is first asked for."""
    made = {}

    def run(method):
        if method not in made:
            out = tmp_path_factory.mktemp(method)
            queue = ("MOCO.QUEUE_SIZE", 20, "SWAV.QUEUE_SIZE", 20)
            words = map(str, (*queue, "CHECKPOINT.PERIOD", 5))
            train(recipe(RECIPE.get(method, method), photographs, out, *words), quiet=True)
            made[method] = out
        return made[method]

    return run


def kept(path):
    """What the method of a run keeps of past batches."""
    run = open_run(path)
    return dictionary_of(run.build(), run.step, run.cfg.SOLVER.BATCH_SIZE)


def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def look(*words):
    return main([str(word) for word in (*words, "--workers", "1")])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_looked_into(runs, method, tmp_path, capsys):
    run = runs(method)
    assert look(run, "-o", tmp_path / "seen", "-k", "3", "--queries", "4") == 0
    said = capsys.readouterr().out
    seen = json.loads((tmp_path / "seen/summary.json").read_text())
    assert (seen["method"], seen["step"]) == (method, STEPS)
    assert set(seen["pictures"].values()) == {
        *("curves.png", "filters.png", "neighbours.png", "spectrum.png", "views.png"),
        *OWN_PICTURES.get(method, []),
    }
    for name in seen["pictures"].values():
        assert min(cv2.imread(str(tmp_path / "seen" / name)).shape[:2]) > 30
    assert said.startswith((tmp_path / "seen/summary.txt").read_text())
    assert all(finding in said for finding in seen["findings"])
    page = (tmp_path / "seen/index.html").read_text()
    assert page.count("data:image/png;base64,") == 5 + len(OWN_PICTURES.get(method, []))
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    # The sample is the fifteen images, through the query encoder and its head.
    assert {"features", "projections"} <= set(seen["geometry"])
    assert seen["geometry"]["projections"]["count"] == 15
    neighbours = seen["neighbours"]
    assert np.shape(neighbours["found"]) == (4, 3)
    assert neighbours["same_class_by_chance"] == pytest.approx(1 / 3)
    assert 0 <= neighbours["same_class"] <= 1
    dictionary = seen["dictionary"]
    kinds = {
        "moco": "queue",
        "dense-cl": "queue",
        "memory-bank": "memory bank",
        "swav": "queue of embeddings",
    }
    assert (dictionary or {}).get("kind") == kinds.get(method)
    assert ("prototypes" in seen) == (method in ("swav", "slot-con"))
    assert ("encoder_k" in seen["filters"]) == (method in ("moco", "end-to-end", "dense-cl"))


def test_the_figures_of_the_queue_are_those_of_its_keys(runs, tmp_path):
    run = runs("moco")
    look(run, "-o", tmp_path / "seen", "--no-images")
    seen = json.loads((tmp_path / "seen/summary.json").read_text())
    assert "neighbours.png" not in seen["pictures"].values()
    queue = checkpoint.load(run / checkpoint.LAST)["state_dict"]["queue"]
    products = (queue @ queue.T).double().numpy()
    found = seen["dictionary"]
    assert (found["size"], found["filled"]) == (20, 20)
    assert found["pointer"] == STEPS * BATCH % 20
    assert found["oldest_key_steps"] == 3  # of 8 keys, the last in part
    assert found["key_encoder_replaced"] == pytest.approx(1 - 0.999**3)
    mean = (products.sum() - products.trace()) / (20 * 19)
    assert found["geometry"]["mean_cosine"] == pytest.approx(mean, rel=1e-3)
    assert found["geometry"]["norms"] == pytest.approx([1, 1, 1], abs=1e-4)


def test_of_a_young_queue_and_bank_only_the_keys_are_measured(runs, tmp_path):
    config = runs("moco")
    state = checkpoint.load(config / checkpoint.LAST)
    state |= {"step": 1}
    state["state_dict"]["queue_ptr"] = torch.tensor([BATCH])
    state["state_dict"]["queue"][:BATCH] = torch.eye(8)[0]
    checkpoint.save(state, tmp_path / "moco")
    found = kept(tmp_path / "moco")
    assert (found.memory.filled, found.geometry.count, found.age) == (BATCH, BATCH, 1)
    assert found.geometry.effective_rank == pytest.approx(1)
    assert any("not full yet" in text for text in found.findings())
    assert any("all alike" in text for text in found.findings())

    state["state_dict"]["queue_ptr"] = torch.tensor([11])
    checkpoint.save(state, tmp_path / "moco")
    found = kept(tmp_path / "moco")
    assert "pointer is at 11" in found.findings()[0]

    bank = runs("memory-bank")
    state = checkpoint.load(bank / "checkpoint_00000005.pth")
    found = kept(bank / "checkpoint_00000005.pth")
    assert found.memory.filled == 15  # 40 samples of 15 images
    from pretrain.methods.memory_bank import ShardedBank

    fresh = ShardedBank(15, 8, seed=0).shard
    state["state_dict"]["bank._extra_state"][4:] = fresh[4:]
    checkpoint.save(state, tmp_path / "bank")
    found = kept(tmp_path / "bank")
    assert (found.memory.filled, found.geometry.count) == (4, 4)


def test_a_checkpoint_alone_is_looked_into_and_shows_no_later_record(runs, tmp_path):
    run = runs("moco")
    early = run / "checkpoint_00000005.pth"
    assert look(early, "-o", tmp_path / "a", "--no-images") == 0
    seen = json.loads((tmp_path / "a/summary.json").read_text())
    assert seen["step"] == seen["last_record"]["iteration"] == 5
    alone = shutil.copy(early, tmp_path / "alone.pth")
    assert look(alone, "-o", tmp_path / "b", "--no-images") == 0
    seen = json.loads((tmp_path / "b/summary.json").read_text())
    assert "curves.png" not in seen["pictures"].values()
    assert any("no curves" in text for text in seen["findings"])


def test_other_images_are_looked_at_where_they_are_named_and_unreadable_ones_left_out(
    runs, tmp_path, capsys
):
    other = write_classes(tmp_path / "other", 8, seed=3)
    (other / "amber" / "00.jpg").write_bytes(b"no picture")
    words = [runs("moco"), "--data", other, "-o", tmp_path / "seen", "-k", "2"]
    assert look(*words) == 0
    seen = json.loads((tmp_path / "seen/summary.json").read_text())
    assert seen["geometry"]["features"]["count"] == 23
    assert all(str(other) in name for row in seen["neighbours"]["found"] for name in row)
    assert any("00.jpg" in text for text in seen["findings"])
    stored = (tmp_path / "seen/features/sample.npy").stat().st_mtime_ns
    assert look(*words) == 0
    assert (tmp_path / "seen/features/sample.npy").stat().st_mtime_ns == stored
    assert look(*words, "--images", "9") == 0
    assert "cached features of sample are out of date" in capsys.readouterr().out
    seen = json.loads((tmp_path / "seen/summary.json").read_text())
    assert seen["geometry"]["features"]["count"] in (8, 9)


def test_without_class_folders_there_is_no_word_of_classes(runs, tmp_path, photographs):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(photographs.rglob("*.jpg"))):
        shutil.copy(path, flat / f"{i}.jpg")
    assert look(runs("simclr"), "--data", flat, "-o", tmp_path / "seen", "-k", "2") == 0
    seen = json.loads((tmp_path / "seen/summary.json").read_text())
    assert "same_class" not in seen["neighbours"]
    assert (tmp_path / "seen/neighbours.png").exists()


def test_looking_changes_nothing_in_the_run(runs, tmp_path):
    run = copy(runs("moco"), tmp_path)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert look(run) == 0
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file()} == before
    assert (run / "inspection/index.html").exists()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(runs, tmp_path, capsys):
    run = copy(runs("moco"), tmp_path)
    for name in (checkpoint.LAST, "checkpoint_00000006.pth"):
        path = run / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()
        path.write_bytes(data)
    assert look(run, "--no-images") == 0
    assert "checkpoint_00000005.pth: moco" in (said := capsys.readouterr().out)
    assert "damaged" in said
    (run / "checkpoint_00000005.pth").write_bytes(b"PK")
    error = mistake(capsys, run, "--no-images")
    assert "is intact" in error
    assert "damaged" in mistake(capsys, run / checkpoint.LAST)


def mistake(capsys, *words):
    capsys.readouterr()
    assert look(*words) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_a_run_that_has_not_saved_yet_shows_its_curves(runs, tmp_path, capsys):
    run = copy(runs("moco"), tmp_path)
    for path in run.glob("*.pth"):
        path.unlink()
    assert look(run) == 0
    assert "no checkpoint yet" in capsys.readouterr().out
    seen = json.loads((run / "inspection/summary.json").read_text())
    assert set(seen["pictures"].values()) == {"curves.png", "views.png"}
    assert seen["checkpoint"] is None


def test_where_there_is_no_run_one_sentence_says_so(runs, tmp_path, capsys):
    assert "nowhere does not exist: pass the --output-dir" in mistake(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "contains no run" in mistake(capsys, tmp_path / "empty")
    (tmp_path / "empty/config.yaml").write_text("MODEL: {META_ARCHITECTURE: GeneralizedRCNN}\n")
    assert "tools/report.py for fine-tuning runs" in mistake(capsys, tmp_path / "empty")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(4, 3, 7, 7)}}, tmp_path / "other.pth")
    assert "not a pre-training checkpoint" in mistake(capsys, tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FLUX": {"CAPACITOR": 1}}, "with the version that wrote it"),
        ({"METHOD": "moco-v9"}, "METHOD is 'moco-v9'"),
        ({"MOCO": {"DIM": 16}}, "does not fit its own configuration"),
    ],
)
def test_a_checkpoint_with_a_strange_configuration_is_one_sentence(
    runs, tmp_path, capsys, change, message
):
    state = checkpoint.load(runs("moco") / checkpoint.LAST)
    config = yaml.safe_load(state["config"])
    for key, value in change.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    checkpoint.save({**state, "config": yaml.safe_dump(config)}, tmp_path / "run")
    assert message in mistake(capsys, tmp_path / "run", "--no-images")


def test_images_that_have_moved_are_one_sentence_with_both_ways_out(
    runs, tmp_path, capsys, photographs
):
    state = checkpoint.load(runs("moco") / checkpoint.LAST)
    config = yaml.safe_load(state["config"])
    config["DATA"] = [str(tmp_path / "gone")]
    run = tmp_path / "run"
    checkpoint.save({**state, "config": yaml.safe_dump(config)}, run)
    error = mistake(capsys, run)
    assert "gone does not exist" in error
    assert "--data" in error
    assert "--no-images" in error
    assert not (run / "inspection").exists()
    assert look(run, "--data", photographs, "-k", "2") == 0


@pytest.mark.parametrize("word", ["--images", "--queries", "-k"])
def test_a_number_that_is_too_small_is_named(runs, capsys, word):
    assert f"{word} is 0" in mistake(capsys, runs("moco"), word, "0")

"""A run is resumed with its own settings and data, or with changes that are named."""

import json
import shutil

import pytest
import torch

from moco_det.config.defaults import default_config, flatten
from moco_det.engine.resume import FREE, LOGGED, changes_of_data, compare_config
from tests.conftest import NARROW, QUICK
from tools.train_net import main

SETTINGS = [*NARROW, *QUICK, "SOLVER.MAX_ITER", "1", "TEST.PRECISE_BN.ENABLED", "False"]


@pytest.fixture(scope="module")
def finished(voc_dir, tmp_path_factory):
    """A run of one iteration, and the words that made it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    words = ["--train-data", f"voc:{voc_dir}:trainval", *SETTINGS]
    assert main(["--config", "VOC-random", "--output-dir", str(run), *words]) == 0
    return run, words


@pytest.fixture
def run(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("config", "overrides", "named"),
    [
        ("COCO-C4-1x-random", [], ["PROTOCOL was 'VOC-random' and is now 'COCO-C4-1x-random'"]),
        (None, ["SEED", "9"], ["SEED was 1 and is now 9"]),
        (
            None,
            ["SOLVER.WEIGHT_DECAY", "0.1", "SOLVER.MOMENTUM", "0.8"],
            ["SOLVER.MOMENTUM was 0.9 and is now 0.8", "SOLVER.WEIGHT_DECAY was 0.0001 and is now"],
        ),
        (
            None,
            ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "1"],
            ["SOLVER.IMS_PER_BATCH was 2 and is now 4"],
        ),
        (None, ["INPUT.MIN_SIZE_TRAIN", "(32,)"], ["INPUT.MIN_SIZE_TRAIN was"]),
    ],
)
def test_other_settings_are_refused_with_both_values_and_nothing_is_written(
    finished, run, capsys, config, overrides, named
):
    before = content(run)
    words = ["--config", config, *finished[1]] if config else []
    assert main(["--resume", "--output-dir", str(run), *words, *overrides]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot change on resume" in error
    for text in named:
        assert text in error
    assert content(run) == before


def test_other_weights_are_refused(voc_dir, weights_file, tmp_path, capsys):
    words = ["--config", "VOC", "--train-data", f"voc:{voc_dir}:trainval", *QUICK]
    words += ["--output-dir", str(tmp_path / "run"), "SOLVER.MAX_ITER", "1"]
    assert main([*words, "MODEL.WEIGHTS", str(weights_file)]) == 0
    other = tmp_path / "other.pkl"
    shutil.copy(weights_file, other)
    assert main(["--resume", *words, "MODEL.WEIGHTS", str(other)]) == 1
    assert f"MODEL.WEIGHTS was '{weights_file}' and is now '{other}'" in capsys.readouterr().err
    # The same file by another path is the same.
    same = f"{weights_file.parent}/../{weights_file.parent.name}/{weights_file.name}"
    assert main(["--resume", *words, "MODEL.WEIGHTS", same]) == 0


def test_a_finished_trial_of_another_protocol_is_not_skipped(finished, run, tmp_path, capsys):
    (tmp_path / "trials").mkdir()
    shutil.move(run, tmp_path / "trials/trial_0")
    words = ["--resume", "--trials", "2", "--output-dir", str(tmp_path / "trials"), *finished[1]]
    assert main(["--config", "COCO-C4-1x-random", *words]) == 1
    assert "PROTOCOL was 'VOC-random'" in capsys.readouterr().err
    assert not (tmp_path / "trials/trial_1").exists()


def test_the_schedule_may_change_is_logged_and_takes_effect(finished, run, capsys):
    """Learning rates are those of a run with the new schedule, by Detectron2's own arithmetic."""
    new = ["SOLVER.MAX_ITER", "4", "SOLVER.BASE_LR", "0.0004", "SOLVER.STEPS", "(2,)"]
    new += ["SOLVER.WARMUP_ITERS", "0", "SOLVER.GAMMA", "0.5"]
    assert main(["--resume", "--output-dir", str(run), *new]) == 0
    out = capsys.readouterr().out
    assert "changed    SOLVER.BASE_LR 0.0025 -> 0.0004" in out
    assert "SOLVER.MAX_ITER 1 -> 4" in out
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["iteration"] > 0]
    assert rates == pytest.approx([0.0004, 0.0002, 0.0002])
    groups = torch.load(run / "model_final.pth", weights_only=True)["trainer"]["_trainer"]
    assert groups["optimizer"]["param_groups"][0]["initial_lr"] == 0.0004


def test_nothing_is_logged_where_nothing_changes(finished, run, capsys):
    words = ["--config", "VOC-random", "--resume", "--output-dir", str(run), *finished[1]]
    assert main([*words, "LOG_PERIOD", "7", "DATALOADER.NUM_WORKERS", "1"]) == 0
    out, err = capsys.readouterr()
    assert "changed  " not in out
    assert err == ""


def test_changed_data_are_named(voc_dir, run, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(voc_dir, data)
    resume = ["--resume", "--output-dir", str(run), "--train-data", f"voc:{data}:trainval"]
    assert main([*resume, "SOLVER.MAX_ITER", "2"]) == 0  # the same files elsewhere
    assert capsys.readouterr().err == ""
    listed = data / "ImageSets/Main/trainval.txt"
    listed.write_text("\n".join(listed.read_text().split()[:3]) + "\n")
    assert main([*resume, "SOLVER.MAX_ITER", "3"]) == 0
    assert (
        "the training data changed since the run started: 3 images instead of 4"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("now", "text"),
    [
        ({}, ""),
        ({"images": 5, "names": "x"}, "5 images instead of 4"),
        ({"names": "x"}, "different file names, or a different order"),
        ({"sizes": "x", "objects": "y"}, "different image sizes, different numbers of objects"),
    ],
)
def test_each_change_of_the_data_has_its_words(now, text):
    before = {"images": 4, "names": "a", "sizes": "b", "objects": "c"}
    assert changes_of_data(before, {**before, **now}) == text


def test_a_checkpoint_without_a_record_of_its_data_is_resumed(run, capsys):
    file = run / "model_final.pth"
    state = torch.load(file, weights_only=True)
    del state["trainer"]["data"]
    torch.save(state, file)
    assert main(["--resume", "--output-dir", str(run), "SOLVER.MAX_ITER", "2"]) == 0
    assert capsys.readouterr().err == ""


def test_every_listed_key_exists():
    keys = flatten(default_config()).keys()
    assert set(FREE) <= keys
    assert all(any(key.startswith(prefix) for key in keys) for prefix in LOGGED)


def test_without_a_checkpoint_nothing_is_compared(run):
    for path in run.glob("*.pth"):
        path.unlink()
    (run / "last_checkpoint").unlink()
    cfg = default_config()
    cfg.OUTPUT_DIR = str(run)
    assert compare_config(cfg) == []

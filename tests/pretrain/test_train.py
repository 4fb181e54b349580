"""Whole runs through the command line, on small images: files, resume, mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pretrain import checkpoint

ROOT = Path(__file__).parents[2]
TINY = (
    "MODEL.DEPTH 18 MODEL.WIDTH 0.0625 MODEL.BN_GROUPS 2 INPUT.CROP_SIZE 32 MOCO.DIM 8 "
    "MOCO.QUEUE_SIZE 20 SOLVER.BATCH_SIZE 8 SOLVER.MAX_ITER 6 CHECKPOINT.PERIOD 3 "
    "CHECKPOINT.KEEP 9 LOG.PERIOD 1 DATALOADER.NUM_WORKERS 0"
).split()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(13):  # not a multiple of the batch
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.jpg"), cv2.resize(coarse, (60, 48)))
    return folder


def pretrain(*words, config="moco-v2", ranks=1):
    command = [sys.executable, str(ROOT / "tools" / "pretrain.py"), "--config", config]
    return subprocess.run(
        [*command, "--num-gpus", str(ranks), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def assert_equal_checkpoints(a, b):
    one, other = checkpoint.load(a), checkpoint.load(b)
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for i, state in one["optimizer"]["state"].items():
        assert torch.equal(
            state["momentum_buffer"], other["optimizer"]["state"][i]["momentum_buffer"]
        )
    assert one["step"] == other["step"]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 1)])
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(
    photographs, tmp_path, ranks, workers
):
    options = ["--data", photographs, *TINY, "DATALOADER.NUM_WORKERS", workers]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = pretrain("--output-dir", whole, *options, ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert "pre-training done" in result.stdout
    # What a killed run leaves: its checkpoint at step 3, and a record that had gone further.
    broken.mkdir()
    shutil.copy(whole / "checkpoint_00000003.pth", broken / checkpoint.LAST)
    lines = (whole / "metrics.json").read_text().splitlines(keepends=True)
    (broken / "metrics.json").write_text("".join(lines[:4]) + '{"iteration": 5, "lo')
    # The queue, its pointer and the position in the data come from the checkpoint, or this fails.
    result = pretrain("--output-dir", broken, "--resume", *options, ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert_equal_checkpoints(whole / checkpoint.LAST, broken / checkpoint.LAST)
    records = [json.loads(line) for line in (broken / "metrics.json").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]


def test_a_run_directory_holds_what_is_promised(photographs, tmp_path):
    out = tmp_path / "run"
    result = pretrain("--data", photographs, "--output-dir", out, *TINY, config="moco-v1")
    assert result.returncode == 0, result.stderr
    assert {"config.yaml", "metrics.json", checkpoint.LAST} <= {p.name for p in out.iterdir()}
    assert list(out.glob("events.out.tfevents.*"))
    last = json.loads((out / "metrics.json").read_text().splitlines()[-1])
    assert {"loss", "accuracy", "spread", "queue_fill", "lr", "images_per_second"} <= set(last)
    state = checkpoint.load(out / checkpoint.LAST)["state_dict"]
    assert state["encoder_q.fc.weight"].shape == (8, 32)
    assert state["encoder_k.layer1.0.conv1.weight"].shape[0] == 4
    again = pretrain("--data", photographs, "--output-dir", out, *TINY)
    assert again.returncode == 1
    assert "already holds a run" in again.stderr


def test_a_checkpoint_of_another_architecture_is_refused_with_the_difference(photographs, tmp_path):
    options = ["--data", photographs, "--output-dir", tmp_path / "run"]
    assert pretrain(*options, *TINY).returncode == 0
    other = pretrain(*options, "--resume", *TINY, "MODEL.DEPTH", "34")
    assert other.returncode == 1
    assert "MODEL.DEPTH was 18 and is now 34" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        ([], "--data is missing"),
        (["--data", "PHOTOS", "SOLVER.BATCH_SIZE", "7"], "cannot be shared by 2 ranks"),
        (["--data", "PHOTOS", "METHOD", "mocco"], "choose one of moco"),
        (["--data", "PHOTOS", "SOLVER.BASE_LR", "1e30"], "lower SOLVER.BASE_LR"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_a_status(photographs, tmp_path, words, message):
    words = [str(photographs) if word == "PHOTOS" else word for word in words]
    ranks = 2 if "7" in words else 1
    out = ["--output-dir", str(tmp_path / "run")]
    at = 2 if words else 0
    result = pretrain(*out, *words[:at], *TINY, *words[at:], ranks=ranks)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "UserError" not in errors[0]
    assert "Traceback" not in result.stderr


def test_the_run_does_not_depend_on_the_number_of_workers(photographs, tmp_path):
    for workers in (0, 2):
        out = tmp_path / str(workers)
        words = ["--data", photographs, "--output-dir", out, *TINY]
        assert pretrain(*words, "DATALOADER.NUM_WORKERS", workers).returncode == 0
    assert_equal_checkpoints(tmp_path / "0" / checkpoint.LAST, tmp_path / "2" / checkpoint.LAST)


def test_pretrain_never_imports_the_detection_side():
    code = (
        "import sys, pretrain.train\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('detectron2', 'moco_det')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""Whole runs through the command line, on small images: files, resume, mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import format as checkpoint
from pretrain.config.defaults import load_config
from pretrain.engine import train_loop
from tests.pretrain.runs import TINY, Run, assert_equal_checkpoints, run, write_photographs
from tools.pretrain import main

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 1)])
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(
    photographs, tmp_path, ranks, workers
):
    options = ["--data", photographs, *TINY, "DATALOADER.NUM_WORKERS", workers]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, text = run("--output-dir", whole, *options, ranks=ranks)
    assert code == 0, text
    assert "pre-training done" in text
    # What a killed run leaves: its checkpoint at step 3, and a record that had gone further.
    broken.mkdir()
    shutil.copy(whole / "checkpoint_00000003.pth", broken / checkpoint.LAST)
    lines = (whole / "metrics.json").read_text().splitlines(keepends=True)
    (broken / "metrics.json").write_text("".join(lines[:4]) + '{"iteration": 5, "lo')
    # The queue, its pointer and the position in the data come from the checkpoint, or this fails.
    code, text = run("--output-dir", broken, "--resume", *options, ranks=ranks)
    assert code == 0, text
    warnings = [line for line in text.splitlines() if "warning" in line]
    assert [line[:36] for line in warnings] == ["warning: MOCO.QUEUE_SIZE is 20, more"]
    assert_equal_checkpoints(whole / checkpoint.LAST, broken / checkpoint.LAST)
    records = [json.loads(line) for line in (broken / "metrics.json").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]


def test_a_run_directory_holds_what_is_promised(photographs, tmp_path):
    out = tmp_path / "run"
    code, text = run("--data", photographs, "--output-dir", out, *TINY, config="moco-v1")
    assert code == 0, text
    assert {"config.yaml", "metrics.json", checkpoint.LAST} <= {p.name for p in out.iterdir()}
    assert not list(out.glob(".*"))
    assert list(out.glob("events.out.tfevents.*"))
    last = json.loads((out / "metrics.json").read_text().splitlines()[-1])
    assert {"loss", "accuracy", "spread", "queue_fill", "lr", "images_per_second"} <= set(last)
    assert {"skipped_images", "checkpoint_pause"} <= set(last)
    state = checkpoint.load(out / checkpoint.LAST)["state_dict"]
    assert state["encoder_q.fc.weight"].shape == (8, 32)
    assert state["encoder_k.layer1.0.conv1.weight"].shape[0] == 4
    code, text = run("--data", photographs, "--output-dir", out, *TINY)
    assert code == 1
    assert "already contains a run" in text


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_of_another_kind_keeps_its_files(photographs, tmp_path, resume):
    files = {
        "config.yaml": "DATASETS: {}\nMODEL: {}\n",
        "metrics.json": '{"iteration": 3}\n',
        "model_final.pth": "weights",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, text = run(*resume, "--data", photographs, "--output-dir", tmp_path, *TINY)
    assert code == 1
    assert "contains a fine-tuning run" in text
    assert text.count("\n") == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_quiet_run_says_nothing_and_a_quiet_fault_is_told(photographs, tmp_path):
    words = ["--data", photographs, "--output-dir", tmp_path / "run", "--quiet", *TINY]
    words += ["MOCO.QUEUE_SIZE", 6]  # more than half of the images would be a warning
    assert run(*words) == (0, "")
    code, text = run(*words)
    assert code == 1
    assert text.startswith("error: ")


def test_a_checkpoint_of_another_architecture_is_refused_with_the_difference(photographs, tmp_path):
    options = ["--data", photographs, "--output-dir", tmp_path / "run"]
    assert run(*options, *TINY)[0] == 0
    code, text = run(*options, "--resume", *TINY, "MODEL.DEPTH", "34")
    assert code == 1
    assert "MODEL.DEPTH was 18 and is now 34" in text
    assert "Traceback" not in text


def test_iterations_alone_make_a_run(photographs, tmp_path):
    out = tmp_path / "run"
    code, text = run("--data", photographs, "--output-dir", out, *TINY, "SOLVER.EPOCHS", "0")
    assert code == 0, text
    assert "6 iterations" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        ([], "--data is missing"),
        (["--data", "PHOTOS", "SOLVER.BATCH_SIZE", "7"], "cannot be shared by 2 ranks"),
        (["--data", "PHOTOS", "METHOD", "mocco"], "choose one of"),
        (["--data", "PHOTOS", "SOLVER.BASE_LR", "1e30"], "lower SOLVER.BASE_LR"),
        (["--data", "PHOTOS", "SOLVER.EPOCHS", "0", "SOLVER.MAX_ITER", "0"], "one of them above 0"),
        (["--data", "PHOTOS", "SOLVER.ACCUMULATION_STEPS", "4"], "BN statistics"),
        (["--data", "PHOTOS", "CHECKPOINT.KEEP", "0"], "CHECKPOINT.KEEP is 0"),
        (["--data", "PHOTOS", "SOLVER.SCHEDULE", "exponential"], "number of iterations between"),
        (["--data", "PHOTOS", "--output-dir", "/dev/null/run"], "cannot be written"),
        (["--data", "PHOTOS", "--resume", "runs/moco/checkpoint_last.pth"], "takes no path"),
        (["--data", "PHOTOS", "--resume", "runs/moco"], "newest checkpoint in --output-dir"),
        (["--data", "PHOTOS", "--resume", "last.pth", "SEED", "1"], "last.pth is a path"),
        (["--data", "PHOTOS", "--show-views", "/dev/null/a/b.png"], "with --show-views"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_a_status(photographs, tmp_path, words, message):
    words = [str(photographs) if word == "PHOTOS" else word for word in words]
    out = [] if "--output-dir" in words else ["--output-dir", tmp_path / "run"]
    at = 2 if words else 0
    ranks = 2 if "7" in words else 1
    code, text = run(*out, *words[:at], *TINY, *words[at:], ranks=ranks)
    assert code == 1
    errors = {line for line in text.splitlines() if line.startswith("error:")}
    assert len(errors) == 1  # of two ranks, the same
    assert message in errors.pop()
    assert "Traceback" not in text


def test_a_wrong_schedule_is_refused_before_the_warm_up(photographs, tmp_path):
    out = tmp_path / "run"
    words = ["SOLVER.SCHEDULE", "cosine", "SOLVER.END_SHARE", "2", "SOLVER.WARMUP_ITERS", "3"]
    code, text = run("--data", photographs, "--output-dir", out, *TINY, *words)
    assert (code, "SOLVER.END_SHARE is 2" in text) == (1, True)
    assert not out.exists()


@pytest.mark.parametrize(
    ("count", "words", "remark"),
    [
        (13, ["SOLVER.MAX_ITER", 9, "SOLVER.EPOCHS", 1], "ends the run after 2 iterations"),
        (1, [], "warning: the data have 1 image, fewer than a batch of 8"),
        (7, [], "warning: the data have 7 images, fewer than a batch of 8"),
        (13, [], "warning: MOCO.QUEUE_SIZE is 20, more than half of the 13 images"),
        (13, ["--resume"], "warning: there is no checkpoint to resume in"),
    ],
)
def test_what_a_user_might_not_expect_is_said(tmp_path, count, words, remark):
    data = write_photographs(tmp_path / "data", count)
    options = ["SOLVER.MAX_ITER", 2, *[word for word in words if word != "--resume"]]
    resume = [word for word in words if word == "--resume"]
    code, text = run(*resume, "--data", data, "--output-dir", tmp_path / "run", *TINY, *options)
    assert code == 0, text
    assert remark in text
    assert ("fewer than a batch" in text) == (count < 8)
    assert ("ends the run after" in text) == ("SOLVER.EPOCHS" in words)


def test_a_foreign_checkpoint_beside_is_named_when_there_is_nothing_to_resume(
    photographs, tmp_path
):
    torch.save({"state_dict": {}}, tmp_path / "moco_v2_800ep.pth")
    words = ["--data", photographs, "--output-dir", tmp_path, *TINY, "SOLVER.MAX_ITER", 1]
    code, text = run("--resume", *words)
    assert code == 0, text
    assert "(only moco_v2_800ep.pth, of another origin): starting at iteration 0" in text


def test_a_lost_loader_process_is_one_sentence(photographs, tmp_path):
    words = ["--data", photographs, "--output-dir", tmp_path, *TINY, "DATALOADER.NUM_WORKERS", 1]
    started = Run(*words, "SOLVER.MAX_ITER", 100000)
    started.wait_for("iter   2/")
    pid = started.ranks[0].pid
    (worker, *_) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert started.wait() == [1], started.text
    assert "error: A data-loading process was lost (DataLoader worker" in started.text
    assert "Traceback" not in started.text


def test_the_run_does_not_depend_on_the_number_of_workers(photographs, tmp_path):
    for workers in (0, 2):
        words = ["--data", photographs, "--output-dir", tmp_path / str(workers), *TINY]
        assert run(*words, "DATALOADER.NUM_WORKERS", workers)[0] == 0
    assert_equal_checkpoints(tmp_path / "0" / checkpoint.LAST, tmp_path / "2" / checkpoint.LAST)


def test_the_command_starts_ranks_and_passes_a_signal_on_to_them(photographs, tmp_path):
    """The one test that pays for fresh processes: the launcher and its two ranks."""
    words = ["--data", photographs, "--output-dir", tmp_path / "run", *TINY]
    command = [sys.executable, ROOT / "tools/pretrain.py", "--config", "moco-v2", "--num-gpus", "2"]
    launcher = subprocess.Popen(
        [*map(str, command), *map(str, words), "SOLVER.MAX_ITER", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert launcher.stdout is not None
    while " loss " not in (line := launcher.stdout.readline()):
        assert line, launcher.communicate()[1]
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 143, errors
    assert "stopped by SIGTERM after iteration" in errors
    assert "Traceback" not in errors
    assert checkpoint.load(tmp_path / "run" / checkpoint.LAST)["step"] >= 1


def test_pretrain_never_imports_the_detection_side():
    code = (
        "import sys, pretrain.engine.train_loop\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('detectron2', 'moco_det')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("device", "gpus", "reason"),
    [
        ("gpu", 1, "is 'gpu': choose auto, cuda, cpu"),
        ("cuda", 0, "sees no GPU here: set it to cpu"),
    ],
)
def test_an_impossible_device_is_one_sentence(tmp_path, monkeypatch, capsys, device, gpus, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    words = ["--config", "moco-v2", "--data", str(tmp_path), "--output-dir", str(tmp_path / "run")]
    assert main([*words, "MODEL.DEVICE", device]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: MODEL.DEVICE is ")
    assert reason in error


@pytest.mark.parametrize(("device", "on_gpu"), [("auto", None), ("cuda", True), ("cpu", False)])
def test_the_device_of_the_run_reaches_the_launcher(monkeypatch, device, on_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {}
    monkeypatch.setattr(train_loop, "launch", lambda *args, **kwargs: found.update(kwargs))
    train_loop.start(load_config("moco-v2", ["MODEL.DEVICE", device]))
    assert found == {"on_gpu": on_gpu}


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    words = ["--config", "moco-v2", "--data", str(tmp_path), "--output-dir", str(tmp_path / "run")]
    assert main([*words, "--num-gpus", "2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --num-gpus is 2, but this machine has 1 GPU:")
    assert not (tmp_path / "run").exists()

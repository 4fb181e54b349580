"""Every fault that a long run meets, caused in a real one."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import format as checkpoint
from tests.pretrain.runs import (
    TINY,
    Run,
    _command,
    assert_equal_checkpoints,
    run,
    write_photographs,
)

ROOT = Path(__file__).parents[3]
LONG = [*TINY, "SOLVER.MAX_ITER", "18", "SOLVER.EPOCHS", "100", "CHECKPOINT.PERIOD", "6"]
LAST = checkpoint.LAST


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def whole(photographs, tmp_path_factory):
    """The run directories of LONG that nothing happened to, by ranks."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        words = ["--data", photographs, "--output-dir", folder / str(ranks), *LONG]
        code, text = run(*words, ranks=ranks)
        assert code == 0, text
    return folder


def copy_until(whole, folder, step):
    """What a run killed a little after this step leaves behind."""
    folder.mkdir()
    for path in sorted(whole.glob("checkpoint_0*.pth")):
        if int(path.stem[-8:]) <= step:
            last = shutil.copy(path, folder)
    os.link(last, folder / LAST)
    return folder


@pytest.mark.parametrize("damage", ["cut off", "flipped byte"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    photographs, whole, tmp_path, damage
):
    folder = copy_until(whole / "1", tmp_path / "run", 12)
    content = bytearray((folder / LAST).read_bytes())
    if damage == "cut off":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 3] ^= 1
    (folder / LAST).write_bytes(content)  # and so the file that it is a second name of
    code, text = run("--resume", "--data", photographs, "--output-dir", folder, *LONG)
    assert code == 0, text
    assert f"{folder / LAST} is damaged" in text
    assert "resuming from checkpoint_00000006.pth" in text
    assert_equal_checkpoints(folder / LAST, whole / "1" / LAST)


def test_a_run_without_a_whole_checkpoint_is_not_resumed(photographs, whole, tmp_path):
    folder = copy_until(whole / "1", tmp_path / "run", 6)
    (folder / LAST).write_bytes(b"")
    code, text = run("--resume", "--data", photographs, "--output-dir", folder, *LONG)
    assert code == 1
    assert "error: All checkpoints" in text
    assert "Traceback" not in text


class Hostile:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_a_hostile_checkpoint_stops_the_run_and_executes_nothing(photographs, whole, tmp_path):
    folder = copy_until(whole / "1", tmp_path / "run", 12)
    (folder / LAST).unlink()
    (folder / LAST).write_bytes(pickle.dumps(Hostile(tmp_path / "executed"), protocol=2))
    code, text = run("--resume", "--data", photographs, "--output-dir", folder, *LONG)
    assert code == 1
    assert "contains more than tensors" in text
    assert not (tmp_path / "executed").exists()


def with_small_files(argv, output, environment):
    size = int(environment["LARGEST_FILE"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    _command(argv, output, environment)


def test_a_disk_that_fills_up_stops_the_run_and_leaves_the_last_checkpoint(
    photographs, whole, tmp_path
):
    folder = tmp_path / "run"
    size = (whole / "1" / LAST).stat().st_size
    if mount(folder, 2 * size + size // 2):
        try:
            code, text = run("--data", photographs, "--output-dir", folder, *LONG)
            content = sorted(path.name for path in folder.glob("*checkpoint*"))
            last = checkpoint.load(folder / LAST)["step"]
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
    else:
        copy_until(whole / "1", folder, 12)
        code, text = run(
            *["--resume", "--data", photographs, "--output-dir", folder, *LONG],
            function=with_small_files,
            LARGEST_FILE=size // 2,
        )
        content = sorted(path.name for path in folder.glob("*checkpoint*"))
        last = checkpoint.load(folder / LAST)["step"]
    assert code == 1
    assert "Traceback" not in text
    assert "free some space and run the command again" in text
    assert last == 12
    assert content == ["checkpoint_00000006.pth", "checkpoint_00000012.pth", LAST]


def mount(folder, size):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode


@pytest.mark.parametrize(
    ("number", "ranks", "status"),
    [
        (signal.SIGTERM, 2, 143),
        (signal.SIGUSR1, 1, 138),
        (signal.SIGINT, 1, 130),
        (signal.SIGHUP, 1, 129),
    ],
)
def test_a_stopped_run_saves_its_last_step_and_goes_on_as_if_never_stopped(
    photographs, whole, tmp_path, number, ranks, status
):
    words = ["--data", photographs, "--output-dir", tmp_path / "run", *LONG]
    words += ["DATALOADER.NUM_WORKERS", 1]
    stopped = Run(*words, ranks=ranks)
    stopped.wait_for("iter  5/")
    if ranks == 1:
        os.killpg(stopped.ranks[0].pid, number)  # the workers too, as a scheduler or terminal does
    else:
        stopped.signal(number, rank=1)
    assert stopped.wait() == [status] * ranks, stopped.text
    assert f"stopped by {number.name} after iteration" in stopped.text
    assert "--resume" in stopped.text
    assert "Traceback" not in stopped.text
    step = checkpoint.load(tmp_path / "run" / LAST)["step"]
    assert 5 <= step < 18
    records = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert json.loads(records[-1])["iteration"] == step
    code, text = run("--resume", *words, ranks=ranks)
    assert code == 0, text
    assert f"resumed at iteration {step}" in text
    assert_equal_checkpoints(tmp_path / "run" / LAST, whole / str(ranks) / LAST)


def test_torchrun_starts_again_from_the_last_checkpoint_when_a_rank_is_killed(
    photographs, whole, tmp_path
):
    """Real torchrun, real ranks: the first 8 steps, kill -9 of rank 1, and to the end."""
    folder = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "127.0.0.1:0", "--monitor-interval", "0.1"]
    words = ["--config", "moco-v2", "--data", photographs, "--output-dir", folder, *LONG]
    with open(tmp_path / "output.txt", "w") as output:
        launcher = subprocess.Popen(
            [*map(str, [sys.executable, *torchrun, ROOT / "tools/pretrain.py", *words])],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
    said = (tmp_path / "output.txt").read_text
    while "iter  8/" not in said():
        assert launcher.poll() is None, said()
        time.sleep(0.005)
    ranks = [int(pid) for pid in children(launcher.pid)]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(timeout=120) == 0, said()
    assert "resumed at iteration 6" in said() or "resumed at iteration 12" in said()
    assert_equal_checkpoints(folder / LAST, whole / "2" / LAST)


def restarted_on_one_host(argv, output, environment):
    if environment["RANK"] == "1":
        environment["TORCHELASTIC_RESTART_COUNT"] = "1"
    _command(argv, output, environment)


def test_all_ranks_resume_when_one_was_restarted(photographs, whole, tmp_path):
    """torchrun counts restarts on the host where a rank was lost, and not on the others."""
    folder = copy_until(whole / "2", tmp_path / "run", 12)
    words = ["--data", photographs, "--output-dir", folder, *LONG, "SOLVER.MAX_ITER", 13]
    code, text = run(*words, ranks=2, function=restarted_on_one_host)
    assert code == 0, text
    assert "resumed at iteration 12" in text


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_second_run_in_the_directory_is_refused_until_the_first_is_dead(photographs, tmp_path):
    folder = tmp_path / "run"
    words = ["--data", photographs, "--output-dir", folder, *LONG, "DATALOADER.NUM_WORKERS", 1]
    first = Run(*words, "SOLVER.MAX_ITER", "100000")
    first.wait_for("iter   1/")
    code, text = run("--resume", *words)
    assert code == 1
    assert "Another run is using" in text
    assert f"process {first.ranks[0].pid} on" in text
    first.wait_until((folder / LAST).exists)
    # Its data-loader worker is left alive for some seconds more, and must not hold the lock.
    os.kill(first.ranks[0].pid, signal.SIGKILL)
    first.ranks[0].wait()
    step = checkpoint.load(folder / LAST)["step"]
    code, text = run("--resume", *words, "SOLVER.MAX_ITER", str(step + 1))
    assert code == 0, text
    first.kill()


@pytest.mark.parametrize(("log", "save"), [(1, 100), (50, 100), (50, 1)])
def test_a_loss_that_is_not_finite_is_told_with_its_first_step(photographs, tmp_path, log, save):
    code, text = run(
        *["--data", photographs, "--output-dir", tmp_path, *LONG, "SOLVER.BASE_LR", "1e12"],
        *["LOG.PERIOD", log, "CHECKPOINT.PERIOD", save],
    )
    assert code == 1
    assert "Traceback" not in text
    assert "error: The loss is nan at iteration 2: lower SOLVER.BASE_LR" in text
    assert ("use --resume to continue from the checkpoint of iteration 1" in text) == (save == 1)
    assert ("no checkpoint has been saved yet" in text) == (save != 1)
    if save == 1:
        state = checkpoint.load(tmp_path / LAST)
        assert state["step"] == 1
        assert all(x.isfinite().all() for x in state["state_dict"].values())


def test_weights_that_are_not_finite_are_never_saved(photographs, tmp_path):
    """The loss of a step may be finite when its update is not."""
    code, text = run(
        *["--data", photographs, "--output-dir", tmp_path, *LONG, "SOLVER.BASE_LR", "3e38"],
        *["MOCO.TEMPERATURE", "0.0001", "CHECKPOINT.PERIOD", 1],
    )
    assert code == 1
    assert "iter  1/18" in text
    assert "is not finite after iteration 1" in text
    assert not list(tmp_path.glob("*.pth"))


def perturbed(argv, output, environment):
    """Rank 1's queue loses one bit after step 8."""
    if environment["RANK"] == "1":
        from pretrain.methods.moco import MoCo

        def after_update(self, step, total_steps):
            if step == 8:
                self.queue.view(torch.int32)[7, 3] ^= 1

        MoCo.after_update = after_update
    _command(argv, output, environment)


def test_ranks_that_have_drifted_apart_are_noticed_and_not_saved(photographs, tmp_path):
    folder = tmp_path / "run"
    words = ["--data", photographs, "--output-dir", folder, *LONG, "MOCO.QUEUE_SIZE", "1000"]
    drifting = Run(*words, ranks=2, function=perturbed)
    assert drifting.wait() == [1, 1]
    assert "error: queue differs between rank 1 and rank 0 after iteration 12" in drifting.text
    assert "Traceback" not in drifting.text
    assert checkpoint.load(folder / LAST)["step"] == 6


def test_what_has_changed_since_the_checkpoint_is_said(photographs, whole, tmp_path):
    folder = copy_until(whole / "2", tmp_path / "run", 12)
    more = write_photographs(tmp_path / "more", 15)
    code, text = run(
        *["--resume", "--data", more, "--output-dir", folder, *LONG],
        *["SOLVER.MAX_ITER", 14, "SOLVER.BASE_LR", 0.001],
    )
    assert code == 0, text
    for said in (
        "was written by 2 ranks and is resumed on 1, from the same position in the data",
        "the data now have 15 images instead of 13",
        "SOLVER.MAX_ITER was 18 and is now 14",
        "SOLVER.BASE_LR was",
        "resumed at iteration 12",
    ):
        assert said in text


@pytest.mark.parametrize("change", ["a name", "a size", "the folder"])
def test_changed_data_are_named_on_resume(photographs, whole, tmp_path, change):
    folder = copy_until(whole / "1", tmp_path / "run", 12)
    data = shutil.copytree(photographs, tmp_path / "data")
    if change == "a name":
        (data / "3.jpg").rename(data / "three.jpg")
    elif change == "a size":
        with (data / "3.jpg").open("ab") as file:
            file.write(b"\0")
    words = ["--data", data, "--output-dir", folder, *LONG, "SOLVER.MAX_ITER", 13]
    code, text = run("--resume", *words)
    assert code == 0, text
    assert f"data: {data}" in text
    named = {"a name": "the names and sizes of", "a size": "the sizes of", "the folder": ""}[change]
    assert (f"{named or 'of'} the images differ from those of the checkpoint" in text) == bool(
        named
    )


def test_unreadable_images_are_counted_and_each_is_named_once(photographs, tmp_path):
    data = shutil.copytree(photographs, tmp_path / "data")
    good = (data / "0.jpg").read_bytes()
    for name in ("cut.jpg", "cut too.jpg"):
        (data / name).write_bytes(good[: len(good) // 3])
    (data / "empty.jpg").touch()
    folder = tmp_path / "run"
    words = ["--data", data, "--output-dir", folder, *TINY, "DATALOADER.MAX_BAD_SHARE", "0.9"]
    assert run(*words, "SOLVER.MAX_ITER", 10, ranks=2)[0] == 0
    code, text = run("--resume", *words, "SOLVER.MAX_ITER", 20, ranks=2)
    assert code == 0, text
    assert "skipped 3 images" in text
    lines = (folder / "skipped_images.txt").read_text().splitlines()
    names = sorted(Path(line.split("\t")[0]).name for line in lines)
    assert names == ["cut too.jpg", "cut.jpg", "empty.jpg"]
    assert all(line.split("\t")[1] for line in lines)

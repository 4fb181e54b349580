"""Faults that a long fine-tuning run meets, caused in a real one."""

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moco_common import hardware
from moco_common.run_lock import NAME
from moco_det.engine import trainer
from tests.conftest import NARROW, QUICK
from tools.train_net import main

ROOT = Path(__file__).parents[3]
SETTINGS = [*NARROW, *QUICK, "TEST.PRECISE_BN.ENABLED", "False"]


@pytest.fixture
def words(voc_dir, tmp_path):
    train = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval"]
    return [*train, "--output-dir", str(tmp_path / "run"), *SETTINGS]


@pytest.mark.parametrize("full", ["checkpoint", "metrics.json", "log.txt"])
def test_a_full_disk_is_one_sentence(words, tmp_path, full):
    """A file that may not grow, or /dev/full; the log's lines are dropped and the run ends well."""
    run = tmp_path / "run"
    run.mkdir()
    if full != "checkpoint":
        (run / full).symlink_to("/dev/full")
        words = ["--resume", *words]

    def limit():
        if full == "checkpoint":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, ROOT / "tools/train_net.py", *words, "SOLVER.MAX_ITER", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=limit)
    assert "Traceback" not in done.stderr
    if full == "log.txt":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "free some space and run the command again" in done.stderr
    assert not list(run.glob("*.pth"))
    assert not list(run.glob(".*.part*"))


def test_files_get_the_users_umask_folders_are_synced_and_leftovers_removed(
    words, tmp_path, monkeypatch
):
    run, synced = tmp_path / "run", set()
    run.mkdir()
    left = run / ".model_final.pth.abc.part"
    left.write_bytes(b"of a killed run")
    sync = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: synced.add(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle),
    )
    before = os.umask(0o027)
    try:
        assert main([*words, "SOLVER.MAX_ITER", "1"]) == 0
    finally:
        os.umask(before)
    assert str(run) in synced
    assert not left.exists()
    modes = {
        path.name: oct(path.stat().st_mode & 0o777) for path in run.iterdir() if path.is_file()
    }
    assert set(modes.values()) == {"0o640"}, modes


def test_more_processes_than_gpus_are_refused_before_anything_is_read(
    words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    at = words.index("MODEL.DEVICE")
    assert main(["--num-gpus", "2", *words[:at], *words[at + 2 :]]) == 1
    error = capsys.readouterr().err
    assert (
        error == "error: --num-gpus is 2, but this machine has 1 GPU: start one process per GPU.\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_restarted_run_resumes_unasked(words, monkeypatch, capsys):
    assert main([*words, "SOLVER.MAX_ITER", "1"]) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert main([*words, "SOLVER.MAX_ITER", "2"]) == 0
    assert "resumed    at iteration 1 of 2" in capsys.readouterr().out


def test_torchrun_restarts_from_the_last_checkpoint_when_a_rank_is_killed(words, tmp_path):
    """Real torchrun, real ranks: kill -9 of rank 1 after the first checkpoint, and to the end."""
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "127.0.0.1:0", "--monitor-interval", "0.1"]
    words = [*words, "SOLVER.MAX_ITER", "40", "SOLVER.CHECKPOINT_PERIOD", "4"]
    command = [*map(str, [sys.executable, *torchrun, ROOT / "tools/train_net.py", *words])]
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        launcher = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
    while not (run / "last_checkpoint").exists():
        assert launcher.poll() is None, output.read_text()
        time.sleep(0.005)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert launcher.wait(timeout=200) == 0, output.read_text()
    assert "resumed    at iteration" in output.read_text()
    assert "resumed    at iteration 0 " not in output.read_text()
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    done = [line["iteration"] for line in lines if "total_loss" in line]
    assert done == sorted(set(done))
    assert done[-1] == 39


def test_a_run_on_another_host_is_refused_while_it_lives_and_passed_over_when_dead(
    words, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    (run / NAME).write_text('{"host": "elsewhere", "pid": 7}\n')
    monkeypatch.setattr("moco_common.run_lock.RunLock._beats", lambda lock: True)
    assert main([*words, "SOLVER.MAX_ITER", "1"]) == 1
    assert "Another run is using" in capsys.readouterr().err
    monkeypatch.setattr("moco_common.run_lock.RunLock._beats", lambda lock: False)
    assert main([*words, "SOLVER.MAX_ITER", "1"]) == 0


def test_a_containers_quota_bounds_the_data_loader_workers(words, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    started = []
    batches = trainer.TrainingSet.batches

    def watched(self, *args, num_workers, **kwargs):
        started.append(num_workers)
        return batches(self, *args, num_workers=num_workers, **kwargs)

    monkeypatch.setattr(trainer.TrainingSet, "batches", watched)
    assert main([*words, "SOLVER.MAX_ITER", "1", "DATALOADER.NUM_WORKERS", "8"]) == 0
    assert set(started) == {1}


def test_a_closed_terminal_saves_the_run(words, tmp_path):
    """A real terminal whose other end is closed: its session gets SIGHUP, its lines EIO."""
    command = [sys.executable, str(ROOT / "tools/train_net.py"), *words, "SOLVER.MAX_ITER", "5000"]
    child, terminal = pty.fork()
    if not child:
        os.chdir(ROOT)
        os.execv(command[0], command)
    said = b""
    while b"iter    3/5000" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129, said
    log = (tmp_path / "run/log.txt").read_text()
    assert "continue with --resume" in log
    assert "Traceback" not in log
    assert (tmp_path / "run/last_checkpoint").is_file()

"""Jobs: what is handed to Slurm, by a fake sbatch; what runs, by submitit on this machine."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from pretrain.checkpoint import format as checkpoint
from pretrain.config.defaults import load_config, split_settings
from pretrain.engine.slurm import submit
from tests.pretrain.runs import TINY, write_photographs
from tools import pretrain as tool

submitit = pytest.importorskip("submitit")


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """A folder at the front of PATH whose sbatch keeps the script and tells a job's number."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "sbatch": f'cp "$1" {tmp_path}/script.sh; echo Submitted batch job 4711',
        "srun": "exit 1",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_the_script_asks_slurm_for_a_task_a_gpu_and_to_be_requeued(fake_slurm, capsys):
    photographs = write_photographs(fake_slurm / "photographs", count=2)
    out = fake_slurm / "runs" / "big"
    command = f"--config moco-v2 --data {photographs} --output-dir {out}"
    settings = "partition=gpu nodes=2 gpus_per_node=8 timeout_min=600 account=vision"
    overrides = "DATALOADER.NUM_WORKERS 7 SOLVER.EPOCHS 100"
    assert tool.main([*command.split(), "--slurm", *settings.split(), *overrides.split()]) == 0
    assert "submitted job 4711 on 16 ranks" in capsys.readouterr().out
    lines = (fake_slurm / "script.sh").read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH")
    )
    expected = {
        "partition": "gpu",
        "nodes": "2",
        "gpus-per-node": "8",
        "ntasks-per-node": "8",
        "cpus-per-task": "8",
        "time": "600",
        "account": "vision",
        "job-name": "big",
        "signal": "USR2@90",
        "requeue": "",
        "open-mode": "append",
    }
    assert {key: asked.get(key) for key in expected} == expected
    (command,) = [line for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=8" in command
    assert "submitit.core._submit" in command
    assert str(out) in command
    pickled = submitit.core.utils.DelayedSubmission.load(out / "slurm" / "4711_submitted.pkl")
    assert "EPOCHS: 100" in pickled.function.config
    # Asked again at its end, it goes back to the queue as it is: it always resumes.
    assert pickled._checkpoint_function().function.config == pickled.function.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["partition"], "--slurm takes KEY=VALUE .*, not 'partition'"),
        (["nodes=two"], "nodes=two: give a whole number"),
        (["partion=gpu"], "Unknown argument 'partion'"),
        (["nodes=3"], "BATCH_SIZE 256 cannot be divided among the 3 tasks"),
    ],
)
def test_a_wrong_setting_is_one_sentence(fake_slurm, settings, message):
    cfg = load_config("moco-v2", ["OUTPUT_DIR", str(fake_slurm / "run")])
    with pytest.raises(Exception, match=message) as caught:
        submit(cfg, settings)
    assert type(caught.value).__name__ == "UserError"
    assert "\n" not in str(caught.value)
    assert not (fake_slurm / "script.sh").exists()


def test_a_refusal_and_a_missing_slurm_are_one_sentence(fake_slurm, monkeypatch):
    cfg = load_config("moco-v2", ["OUTPUT_DIR", str(fake_slurm / "run")])
    (fake_slurm / "bin" / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2; exit 1\n")
    with pytest.raises(Exception, match="could not be submitted: .*"):
        submit(cfg, ["partition=none"])
    monkeypatch.setenv("PATH", str(fake_slurm))
    with pytest.raises(Exception, match="could not be submitted: .*srun"):
        submit(cfg, ["partition=gpu"])
    (fake_slurm / "run" / checkpoint.LAST).touch()
    with pytest.raises(Exception, match="already contains a run: pass --resume"):
        submit(cfg, ["partition=gpu"])


def test_settings_end_where_overrides_begin():
    assert split_settings(["nodes=2", "SOLVER.EPOCHS", "3"]) == (
        ["nodes=2"],
        ["SOLVER.EPOCHS", "3"],
    )
    assert split_settings([]) == ([], [])


def children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the tasks in /proc")
def test_a_preempted_job_saves_requeues_itself_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "run"
    overrides = "SOLVER.MAX_ITER 60 CHECKPOINT.PERIOD 1000".split()  # only the preemption saves
    cfg = load_config("moco-v2", [*TINY, *overrides])
    cfg.DATA, cfg.OUTPUT_DIR = [str(write_photographs(tmp_path / "photographs"))], str(out)
    sentence = submit(cfg, ["cluster=local", "tasks_per_node=2", "timeout_min=5"])
    controller = int(sentence.split()[2])
    log = out / "slurm" / f"{controller}_0_log.out"
    wait_until(lambda: log.exists() and "loss" in log.read_text())
    tasks = children(controller)
    assert len(tasks) == 2
    for task in tasks:
        os.kill(task, signal.SIGUSR2)  # as Slurm does before the time limit
    wait_until(lambda: "Job completed successfully" in log.read_text())
    first, second = log.read_text().split("Requeued job")
    saved = int(re.search(r"resumed at iteration (\d+)", second)[1])
    assert 1 <= saved < 60
    assert "on 2 ranks" in first
    assert "on 2 ranks" in second
    records = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(1, 61))
    assert checkpoint.load(out / checkpoint.LAST)["step"] == 60


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)

"""The processes of a run: which error arrives when a rank fails, and the effect of a signal."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from moco_common import comm
from moco_common import launch as launching
from moco_common.errors import UserError
from moco_common.launch import (
    _wait_for_a_failure_or_all,
    check_processes,
    launch,
    restarted,
    under_torchrun,
)
from moco_common.stopping import Stopped, StopRequest
from tests.moco_det.ranks import preload
from tests.pretrain.forks import Fork
from tests.pretrain.ranks import free_port, torchrun_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch):
    """Ranks that need not import everything anew."""
    preload()
    monkeypatch.setattr(launching, "START_METHOD", "forkserver")


def failing(error, everywhere=False):
    if everywhere or comm.rank() == 1:
        raise error
    comm.barrier()  # fails in its turn, for want of the other rank


def test_a_users_mistake_on_a_rank_is_the_callers_whoever_fails_first():
    with pytest.raises(UserError, match="^cannot read 7.jpg:\nit is empty$") as error:
        launch(failing, 2, UserError("cannot read 7.jpg:\nit is empty"))
    assert error.value.__suppress_context__


def test_another_error_keeps_the_traceback_of_its_rank():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="in failing"):
        launch(failing, 2, ValueError("a fault of ours"), True)


def dying():
    if comm.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the launcher ends this rank


def test_a_killed_rank_ends_the_run_with_the_way_to_resume():
    with pytest.raises(UserError, match="A rank was lost.*SIGKILL.*--resume"):
        launch(dying, 2)


class Ending:
    """A rank that ends well between the first and the second time that it is polled."""

    def __init__(self):
        self.asked = 0
        self.sentinel, ours = os.pipe()
        os.close(ours)  # ready to be read, as a process's is once it has ended

    def is_alive(self):
        self.asked += 1
        return self.asked < 2

    @property
    def exitcode(self):
        return None if self.asked < 2 else 0


@pytest.mark.timeout(20)
def test_ranks_that_end_while_they_are_polled_are_not_waited_for_for_ever():
    _wait_for_a_failure_or_all([Ending()])


def until_stopped(folder, listening):
    (folder / str(comm.rank())).touch()
    with StopRequest() as stop:
        while listening and not (number := stop.signal):
            time.sleep(0.01)
    if listening:
        (folder / f"stopped{comm.rank()}").touch()
        raise Stopped(number)
    time.sleep(60)


@pytest.mark.parametrize(
    ("listening", "number", "status"),
    [(True, 15, 143), (True, 2, 130), (True, 1, 129), (False, 15, 143), (False, 2, 130)],
)
def test_a_signal_reaches_the_ranks_which_stop_with_its_status(tmp_path, listening, number, status):
    """Also where they are in set-up, and obey at once: then the launcher says what to do."""

    def send():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    before = signal.getsignal(number)
    sender.start()
    with pytest.raises(Stopped) as stopped:
        launch(until_stopped, 2, tmp_path, listening)
    sender.join()
    assert stopped.value.exit_status == status
    assert bool(stopped.value.message) != listening
    assert len(list(tmp_path.glob("stopped*"))) == 2 * listening
    assert signal.getsignal(number) is before


SLOW = """
import os, sys, time
if __name__ != "__main__":
    os.write(1, b"importing\\n")
    time.sleep(60)
def work(): time.sleep(300 if 'waiting' in sys.argv else 0)
if __name__ == "__main__":
    from moco_common.errors import run_tool
    from moco_common.launch import launch
    sys.exit(run_tool(lambda: launch(work, 2)))
"""


def test_ctrl_c_while_the_ranks_import_ends_in_one_line(tmp_path):
    """A terminal sends SIGINT to the whole process group."""
    (tmp_path / "slow.py").write_text(SLOW)
    tool = subprocess.Popen(
        [sys.executable, tmp_path / "slow.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert tool.stdout.readline() == "importing\n"
    assert tool.stdout.readline() == "importing\n"
    os.killpg(tool.pid, signal.SIGINT)
    assert tool.wait(60) == 130
    error = tool.stderr.read()
    assert error.startswith("stopped: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("processes", "gpus", "environment", "reason"),
    [
        (3, 2, {}, "^--num-gpus is 3, but this machine has 2 GPUs"),
        (2, 1, {}, "^--num-gpus is 2, but this machine has 1 GPU:"),
        (0, 0, {}, "^--num-gpus must be at least 1, not 0"),
        (1, 2, {"LOCAL_WORLD_SIZE": "3"}, "^torchrun starts 3, but this machine has 2 GPUs"),
        (2, 2, {}, None),
        (3, 0, {}, None),  # on the CPU any number
    ],
)
def test_more_processes_than_gpus_are_refused(monkeypatch, processes, gpus, environment, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    group = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (group if environment else {}).items():
        monkeypatch.setenv(name, value)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if reason is None:
        check_processes(processes)
    else:
        with pytest.raises(UserError, match=reason):
            check_processes(processes)
        if processes:
            check_processes(processes, on_gpu=False)


@pytest.fixture
def _torchrun_of_one(monkeypatch):
    """One rank of one, on a machine with one GPU, if torch is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    port = str(launching._free_port())
    names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_torchrun_of_one")
def test_ranks_on_cpus_use_gloo_where_there_are_gpus():
    def look():
        found.append((torch.distributed.get_backend(), comm.device().type, comm.maximum(3)))

    found = []
    launch(look, 1, on_gpu=False)
    assert found == [("gloo", "cpu", 3)]


@pytest.mark.usefixtures("_torchrun_of_one")
def test_a_rank_takes_its_gpu_before_nccl_starts_and_gives_rank_0_hours(monkeypatch):
    def start(backend, **options):
        calls.append((backend, options["timeout"]))

    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.append(index))
    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    launch(lambda: calls.append("the run"), 1)
    assert calls[0] == 0
    assert calls[1][0] == "nccl"
    assert calls[1][1] >= timedelta(hours=1)  # NCCL's own 10 minutes end a long evaluation
    assert calls[2:] == ["the run"]


@pytest.mark.usefixtures("_torchrun_of_one")
def test_a_run_on_cpus_leaves_the_gpu_alone_without_ranks_too(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    found = []
    for on_gpu in (False, None):
        launch(lambda: found.append(comm.device().type), 1, on_gpu=on_gpu)
    assert found == ["cpu", "cuda"]


@pytest.mark.usefixtures("_torchrun_of_one")
def test_a_port_in_use_is_one_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        taken.listen()
        with pytest.raises(UserError, match=rf"^port {os.environ['MASTER_PORT']}, .* is in use"):
            launch(print, 1, on_gpu=False)


def test_a_port_in_use_is_one_sentence_from_ranks_too(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(launching, "_free_port", lambda: taken.getsockname()[1])
        with pytest.raises(UserError, match=r"^port \d+, .* is in use .*: start again"):
            launch(print, 2)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.agreed() == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.agreed() == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_restart_is_known_by_the_launchers_count(monkeypatch):
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "0")
        assert not restarted()
        monkeypatch.setenv(name, "2")
        assert restarted()
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1", "RANK": "0"}, False),  # as containers have it
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, True),
        ({"WORLD_SIZE": "8"}, False),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "no numbers"),
        ({"WORLD_SIZE": "1", "RANK": "3"}, "RANK is not below WORLD_SIZE"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK is not below WORLD_SIZE"),
    ],
)
def test_a_launcher_is_recognised_by_a_complete_environment(monkeypatch, environment, expected):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, bool):
        assert under_torchrun() == expected
    else:
        with pytest.raises(UserError, match=f"{expected}.*unset RANK and WORLD_SIZE"):
            under_torchrun()


def test_ranks_that_wait_for_each_other_say_so_and_give_up_in_one_sentence(monkeypatch, capfd):
    monkeypatch.setattr(launching, "QUIET", 0.2)
    monkeypatch.setattr(launching, "MEETING", timedelta(seconds=2))
    port = str(launching._free_port())
    for name, value in zip(
        ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"),
        "2 1 127.0.0.1".split() + [port],
        strict=True,
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"did not meet at 127.0.0.1:{port}"):
        launch(print, 1)
    shown = capfd.readouterr().err  # also what torch writes below Python
    assert shown == f"waiting for 1 other rank at 127.0.0.1:{port}, up to {4 / 60:g} minutes\n"


def joining_slowly(environment, folder):
    """A rank of torchrun; rank 1 joins the group late."""

    def join_and_record(*args, **options):
        join(*args, **options)
        time.sleep(comm.rank())
        (folder / environment["RANK"]).touch()

    os.environ.update(environment)
    join = torch.distributed.init_process_group
    torch.distributed.init_process_group = join_and_record
    launch(refusing, 1, folder, on_gpu=False)


def refusing(folder):
    (folder / f"seen by {comm.rank()}").write_text(str((folder / "1").exists()))
    raise UserError("no")


def test_no_rank_starts_and_fails_while_another_is_still_joining(tmp_path):
    port = free_port()
    ranks = [Fork(joining_slowly, torchrun_environment(i, 2, port), tmp_path) for i in range(2)]
    assert all(rank.wait(60) for rank in ranks)
    assert [(tmp_path / f"seen by {i}").read_text() for i in range(2)] == ["True", "True"]


def test_rank_0_which_may_hold_the_store_leaves_last():
    store = torch.distributed.HashStore()
    host = threading.Thread(target=launching._wait_for_all, args=(store, 0, 2), daemon=True)
    host.start()
    for word in ("joined 1", "ready 1"):
        host.join(0.2)
        assert host.is_alive()
        store.set(word, "")
    host.join(10)
    assert not host.is_alive()


def test_ranks_end_with_a_launcher_that_is_killed_while_they_start(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.replace("time.sleep(60)", "time.sleep(1)"))
    tool = subprocess.Popen(
        [sys.executable, tmp_path / "slow.py", "waiting"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert tool.stdout.readline() == "importing\n"
    assert tool.stdout.readline() == "importing\n"
    tool.kill()
    assert tool.wait(60) == -9
    # Its ranks hold the other end of the pipe: the end of the file is the end of all of them.
    started = time.monotonic()
    tool.stdout.read()
    assert time.monotonic() - started < 60

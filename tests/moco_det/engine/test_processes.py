"""The processes of a run: whose error arrives, and what a signal does."""

import os
import signal
import threading
import time

import pytest
import torch.distributed as dist

from moco_common.errors import UserError
from moco_det.engine import processes
from moco_det.engine.processes import launch
from moco_det.engine.stopping import Stopped, StopRequest
from tests.moco_det.ranks import preload


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch):
    """Ranks that need not import everything anew."""
    preload()
    monkeypatch.setattr(processes, "START_METHOD", "forkserver")


def one_rank_refuses(folder):
    """The second rank finds a mistake while the first waits for it."""
    if dist.get_rank() == 1:
        raise UserError("cannot read 7.jpg:\nit is empty")
    dist.barrier()


def until_stopped(folder):
    stop = StopRequest()
    with stop.listening():
        (folder / str(dist.get_rank())).touch()
        while not (number := stop.signal):
            time.sleep(0.01)
    (folder / f"stopped{dist.get_rank()}").touch()
    raise Stopped(number)


def test_a_ranks_mistake_arrives_as_it_was_whoever_fails_first(tmp_path):
    with pytest.raises(UserError) as error:
        launch(one_rank_refuses, 2, tmp_path)
    assert str(error.value) == "cannot read 7.jpg:\nit is empty"
    assert error.value.__suppress_context__


def test_a_signal_reaches_the_ranks_which_stop_with_its_code(tmp_path):
    def send():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(SystemExit) as stopped:
        launch(until_stopped, 2, tmp_path)
    sender.join()
    assert stopped.value.code == 143
    assert len(list(tmp_path.glob("stopped*"))) == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

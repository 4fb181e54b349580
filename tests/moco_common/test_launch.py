"""The processes of a run: what the caller hears when a rank fails or dies."""

import os
import signal
import time

import pytest
import torch

from moco_common import comm
from moco_common.errors import UserError
from moco_common.launch import _wait_for_a_failure_or_all, launch


def failing(error, everywhere=False):
    if everywhere or comm.rank() == 1:
        raise error
    comm.barrier()  # fails in its turn, for want of the other rank


def test_a_users_mistake_on_a_rank_is_the_callers():
    with pytest.raises(UserError, match="^lower the batch$"):
        launch(failing, 2, UserError("lower the batch"))


def test_another_error_keeps_the_traceback_of_its_rank():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="in failing"):
        launch(failing, 2, ValueError("a fault of ours"), True)


def dying():
    if comm.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the launcher ends this rank


def test_a_killed_rank_ends_the_run_with_the_way_on():
    with pytest.raises(UserError, match="A rank was lost.*SIGKILL.*--resume"):
        launch(dying, 2)


class Ending:
    """A rank that ends well between being asked for the first time and the second."""

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
def test_ranks_that_end_while_they_are_asked_are_not_waited_for_for_ever():
    _wait_for_a_failure_or_all([Ending()])

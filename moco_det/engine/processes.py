"""The processes of a run: ranks on this machine, or the rank that ``torchrun`` made of this one.

The backend is chosen here and named nowhere else: NCCL where there are GPUs, else gloo.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from moco_common.errors import UserError
from moco_common.launch import under_torchrun
from moco_det.engine.stopping import SIGNALS, Stopped

START_METHOD = "spawn"  # a forked process could not use a GPU that this one has touched
GRACE = 30.0  # seconds that the other ranks have to end once one has failed


def launch(function: Callable[..., Any], processes: int, *args: Any) -> None:
    """Run ``function(*args)`` on ``processes`` ranks of this machine, one a GPU where there are
    GPUs; or as the rank that ``torchrun`` made this process.

    Signals to stop are passed on to the ranks.

    Raises:
        UserError: of a rank, or because a rank was killed.
        Stopped: the ranks were asked to stop, and did.
        Exception: whatever else ``function`` raises; of several processes as
            ``mp.ProcessRaisedException``, which holds the traceback of the rank that failed.
    """
    if under_torchrun():
        _join_group(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        function(*args)
    elif processes > 1:
        _launch_ranks(function, processes, args)
    else:
        function(*args)


def leave_group() -> None:
    """End this process's membership of the group of ranks, where it has one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _launch_ranks(function: Callable[..., Any], processes: int, args: tuple[Any, ...]) -> None:
    # When one rank fails the others fail for want of it, and spawn reports whichever it sees
    # first; a user's mistake reaches us here whoever comes first.
    mistakes = mp.get_context(START_METHOD).SimpleQueue()
    context = mp.start_processes(
        _as_rank,
        (processes, _free_port(), function, args, mistakes),
        processes,
        join=False,
        start_method=START_METHOD,
    )
    with _passing_signals_on(context.processes) as received:
        _wait(context.processes)
        try:
            while not context.join():
                pass
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            if not mistakes.empty():
                raise UserError(mistakes.get()) from None
            codes = {process.exitcode for process in context.processes}
            for number in (*received, *SIGNALS):
                # A rank that was still starting obeyed at once, to the dismay of the others.
                if 128 + number in codes or (number in received and -number in codes):
                    raise Stopped(number) from None
            if isinstance(error, mp.ProcessExitedException):
                raise UserError(
                    f"a process of the run was lost ({error}): go on with --resume."
                ) from None
            raise


def _wait(processes: list[Any]) -> None:
    """Wait for all, and not for ever once one has failed: the others may wait for it."""
    while alive := [process for process in processes if process.is_alive()]:
        failed = any(process.exitcode for process in processes)
        ended = connection.wait([p.sentinel for p in alive], timeout=GRACE if failed else None)
        if failed and not ended:
            for process in alive:
                process.kill()


@contextmanager
def _passing_signals_on(processes: list[Any]) -> Iterator[list[int]]:
    """While this lasts, signals to stop go on to the processes; they are noted in the list."""
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        # A terminal's Ctrl-C has reached them by itself; a second one would not be gentle.
        passed = signal.SIGTERM if number == signal.SIGINT else number
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, passed)

    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, pass_on) for n in SIGNALS} if main else {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _as_rank(
    rank: int, processes: int, port: int, function: Any, args: tuple[Any, ...], mistakes: Any
) -> None:
    # Every rank has its share of the cores; more threads than cores only fight.
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _join_group(rank, processes, init_method=f"tcp://127.0.0.1:{port}", rank=rank)
    try:
        function(*args)
    except UserError as error:
        mistakes.put(str(error))
        raise
    except KeyboardInterrupt:  # spawn would call it a success
        raise Stopped(signal.SIGINT) from None
    finally:
        leave_group()


def _join_group(local_rank: int, local_size: int, **where: Any) -> None:
    if dist.is_initialized():
        return  # torchrun's, for several runs
    if where:
        where["world_size"] = local_size
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo", **where)
    comm.create_local_process_group(local_size)
    if gpu:
        torch.cuda.set_device(local_rank)
    comm.synchronize()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

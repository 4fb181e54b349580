"""The processes of a run: ranks on this machine, or the rank that ``torchrun`` made of this one.

The backend is chosen here and named nowhere else: NCCL where there are GPUs, else gloo.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco_common.errors import UserError
from moco_common.stopping import SIGNALS, Stopped

GRACE = 20.0  # seconds that the other ranks have to end once one is lost
_LOST = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)  # exit codes


def launch(function: Callable[..., Any], processes: int, *args: Any) -> None:
    """Run ``function(*args)`` on ``processes`` ranks of this machine, or as the rank that
    ``torchrun`` made this process.

    A signal to stop that reaches this process is passed on to its ranks.

    Args:
        processes: ranks to start: GPUs where there are GPUs, else gloo processes on the CPU.

    Raises:
        UserError: of a rank, or because a rank was killed.
        Stopped: by a signal.
        Exception: whatever else ``function`` raises; of several processes as
            ``mp.ProcessRaisedException``, which holds the traceback of the rank that failed.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _as_rank(None, None, None, function, args, None)
    elif processes > 1:
        _on_ranks(function, processes, args)
    else:
        function(*args)


def restarted() -> bool:
    """Whether a launcher has started this run anew: ``torchrun`` after the loss of a rank, Slurm
    after a requeue. Such a run goes on from its last checkpoint, unasked. (torchrun counts restarts
    on each host: that one rank was restarted is enough, see `train`.)"""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) > 0 for name in counts)


def _on_ranks(function: Callable[..., Any], processes: int, args: Any) -> None:
    # When one rank fails, the others fail for want of it, and spawn reports whichever it sees
    # first; a user's mistake reaches us here whoever comes first.
    endings = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(
        _as_rank,
        (processes, _free_port(), function, args, endings),
        nprocs=processes,
        join=False,
    )
    assert context is not None
    ranks = context.processes
    with _passing_signals_on(ranks) as received:
        _wait_for_a_failure_or_all(ranks)
        # Some may wait for a lost one for ever; they put off SIGTERM, and join() sends no more.
        killer = threading.Timer(GRACE, _kill, [ranks])
        killer.daemon = True
        killer.start()
        try:
            while not context.join():  # ends the others, and raises what went wrong
                pass
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            for ending in _all(endings):
                if isinstance(ending, str):
                    raise UserError(ending) from None
            if received:  # before there was anything to save
                raise Stopped(received[0]) from None
            # Of a rank that was killed, the error of another one, which misses it, says nothing.
            killed = [(i, -rank.exitcode) for i, rank in enumerate(ranks) if rank.exitcode in _LOST]
            if not killed and isinstance(error, mp.ProcessRaisedException):
                raise
            reason = ", ".join(f"rank {i} by {signal.Signals(n).name}" for i, n in killed)
            raise UserError(
                f"A rank was lost ({reason or error}): go on with --resume from the last "
                f"checkpoint."
            ) from None
        finally:
            killer.cancel()
    for ending in _all(endings):
        raise Stopped(received[0] if received else ending)


def _wait_for_a_failure_or_all(ranks: list[Any]) -> None:
    """Until a rank has failed or all have ended."""
    # Asked once a round: of ranks that end in between, nothing would be left to wait for, for ever.
    while alive := [rank for rank in ranks if rank.is_alive()]:
        if any(rank.exitcode for rank in ranks):
            return
        connection.wait([rank.sentinel for rank in alive])


@contextmanager
def _passing_signals_on(ranks: list[Any]) -> Iterator[list[int]]:
    """Meanwhile a signal to stop goes on to the ranks, and is noted in the list."""
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        for rank in ranks:
            if rank.exitcode is None:
                # A terminal's Ctrl-C has reached them by itself, and a second one would abort them.
                os.kill(rank.pid, signal.SIGTERM if number == signal.SIGINT else number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(ranks: list[Any]) -> None:
    for rank in ranks:
        if rank.is_alive():
            rank.kill()


def _all(queue: Any) -> Iterator[Any]:
    while not queue.empty():
        yield queue.get()


def _as_rank(
    local_rank: int | None,
    processes: int | None,
    port: int | None,
    function: Any,
    args: Any,
    endings: Any,
) -> None:
    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    if processes is None:
        _join_torchrun(backend)
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
    else:
        assert local_rank is not None
        # Every rank has its share of the cores; more threads than cores only fight.
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        dist.init_process_group(
            backend,
            init_method=f"tcp://127.0.0.1:{port}",
            rank=local_rank,
            world_size=processes,
        )
    if on_gpu:
        torch.cuda.set_device(local_rank)
    try:
        function(*args)
    except UserError as error:
        if endings is not None:
            endings.put(str(error))
        raise
    except Stopped as stopped:
        if endings is None:
            raise
        endings.put(stopped.signal)  # and this rank has ended well
    finally:
        dist.destroy_process_group()


def _join_torchrun(backend: str) -> None:
    """Meet the other ranks, of this start of the group and not of the one before: torchrun keeps
    its store over restarts, with the dead ranks' addresses in it, and to read those is to hang
    (pytorch issue 135712)."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    elif restarts and rank == 0 and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        # Hosts count restarts each for itself, so the count cannot tell starts apart.
        print(
            "warning: a restart may hang: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on "
            "every host",
            file=sys.stderr,
        )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def under_torchrun() -> bool:
    """Whether ``torchrun`` has started this process (as one of several) and named it."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys()

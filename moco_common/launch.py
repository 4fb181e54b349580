"""The processes of a run: ranks started on this machine, or one rank started by ``torchrun``.

The backend is chosen here: NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import connection, parent_process
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco_common import comm
from moco_common.errors import UserError
from moco_common.hardware import cpu_count, restarted, under_torchrun
from moco_common.stopping import Stopped, signals_to_stop
from moco_common.text import counted

__all__ = ["check_processes", "launch", "planned_ranks", "restarted", "under_torchrun"]

START_METHOD = "spawn"  # a forked process could not use a GPU that this one has used
GRACE = 20.0  # seconds that the other ranks have to end once one is lost
ORPHAN_GRACE = 300.0  # seconds that a rank has to save and end once its launcher is lost
MEETING = timedelta(minutes=10)  # for an attempt of the ranks to meet at the start
# Time that a rank waits for the others in a collective. The defaults, 10 minutes of NCCL and 30 of
# gloo, are shorter than what rank 0 may take to evaluate or to save while the others wait. The
# launcher notices a lost rank at once.
COLLECTIVE = timedelta(hours=3)
STDERR = 2  # file descriptor
QUIET = 10.0  # seconds before a line says that they wait
_LOST = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)  # exit codes
_STOPPED = "stopped: run the same command again, with --resume if there is a checkpoint"


def launch(
    function: Callable[..., Any], processes: int, *args: Any, on_gpu: bool | None = None
) -> None:
    """Run ``function(*args)`` on ``processes`` ranks of this machine, or as the rank that
    ``torchrun`` made this process.

    A signal to stop that reaches this process is passed on to its ranks.

    Args:
        processes: ranks to start: one per GPU, or gloo processes on CPUs.
        on_gpu: False for CPUs on a machine with GPUs; by default GPUs where there are any.

    Raises:
        UserError: from a rank, because a rank was killed, the port is in use, or because there are
            too few GPUs.
        Stopped: the run was stopped by a signal.
        Exception: whatever else ``function`` raises; with several processes as
            ``mp.ProcessRaisedException``, which holds the traceback of the failed rank.
    """
    check_processes(processes, on_gpu)
    comm.leave_gpus(on_gpu is False)
    if under_torchrun():
        _as_rank(None, None, None, on_gpu, function, args, None)
    elif processes > 1:
        _on_ranks(function, processes, on_gpu, args)
    else:
        function(*args)


def planned_ranks(processes: int) -> int:
    """Return the number of ranks on all machines that `launch` will use."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else processes


def check_processes(processes: int, on_gpu: bool | None = None) -> None:
    """Check that this machine has a GPU for each of its ranks, where it has any and they are used.

    Raises:
        UserError: there are too few GPUs, or ``processes`` is below 1.
    """
    if processes < 1:
        raise UserError(f"--num-gpus must be at least 1, not {processes}.")
    gpus = torch.cuda.device_count() if _uses_gpus(on_gpu) else 0
    if under_torchrun():
        local = int(os.environ.get("LOCAL_RANK", 0)) + 1
        needed = max(local, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    else:
        needed = processes
    if gpus and needed > gpus:
        asked = f"torchrun starts {needed}" if under_torchrun() else f"--num-gpus is {needed}"
        raise UserError(
            f"{asked}, but this machine has {counted(gpus, 'GPU')}: start one process per GPU."
        )


def _uses_gpus(on_gpu: bool | None) -> bool:
    return on_gpu is not False and torch.cuda.is_available()


def _on_ranks(function: Callable[..., Any], processes: int, on_gpu: bool | None, args: Any) -> None:
    # When one rank fails, the others fail in consequence, and torch reports whichever it sees
    # first; a user's mistake arrives here whoever comes first.
    endings = mp.get_context(START_METHOD).SimpleQueue()
    # Its warnings on each process that it ends say no more than the one line that follows.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    ranks: list[Any] = []
    with _passing_signals_on(ranks) as received:
        with _interrupts_blocked():
            context = mp.start_processes(
                _as_rank,
                (processes, _free_port(), on_gpu, function, args, endings),
                nprocs=processes,
                join=False,
                start_method=START_METHOD,
            )
            ranks += context.processes
        if received:  # while they were being started
            _terminate(ranks, received[0])
        _wait_for_a_failure_or_all(ranks)
        # Some may wait forever for a lost one; they defer SIGTERM, and join() sends nothing else.
        killer = threading.Timer(GRACE, _kill, [ranks])
        killer.daemon = True
        killer.start()
        try:
            while not context.join():  # ends the others and raises the error of the failed one
                pass
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            for ending in _all(endings):
                if isinstance(ending, str):
                    raise UserError(ending) from None
            if received:  # outside the training loop, signals act at once
                raise Stopped(received[0], _STOPPED) from None
            # After a rank was killed, the errors of the others are mere consequences.
            killed = [(i, -rank.exitcode) for i, rank in enumerate(ranks) if rank.exitcode in _LOST]
            if not killed and isinstance(error, mp.ProcessRaisedException):
                raise
            reason = ", ".join(f"rank {i} by {signal.Signals(n).name}" for i, n in killed)
            raise UserError(
                f"A rank was lost ({reason or error}): resume from the last checkpoint with "
                f"--resume."
            ) from None
        finally:
            killer.cancel()
    for ending in _all(endings):
        number, message = ending
        raise Stopped(received[0] if received else number, message)


def _wait_for_a_failure_or_all(ranks: list[Any]) -> None:
    """Wait until one rank has failed or all have ended."""
    # Polled once per round: if all ranks ended in between, nothing would be left to wait for.
    while alive := [rank for rank in ranks if rank.is_alive()]:
        if any(rank.exitcode for rank in ranks):
            return
        connection.wait([rank.sentinel for rank in alive])


@contextmanager
def _passing_signals_on(ranks: list[Any]) -> Iterator[list[int]]:
    """Forward signals to stop to the ranks, and record them in the yielded list."""
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in received:
            _kill(ranks)
            raise KeyboardInterrupt
        received.append(number)
        _terminate(ranks, number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, pass_on) for number in signals_to_stop()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT; processes started meanwhile inherit that and print no traceback on Ctrl-C while
    they import: it reaches them through `_passing_signals_on`, as SIGTERM."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _terminate(ranks: list[Any], number: int) -> None:
    for rank in ranks:
        if rank.exitcode is None:
            os.kill(rank.pid, signal.SIGTERM if number == signal.SIGINT else number)


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
    on_gpu: bool | None,
    function: Any,
    args: Any,
    endings: Any,
) -> None:
    comm.leave_gpus(on_gpu is False)
    on_gpu = _uses_gpus(on_gpu)
    backend = "nccl" if on_gpu else "gloo"
    if on_gpu:  # before NCCL makes a communicator, which belongs to the current GPU
        torch.cuda.set_device(
            int(os.environ.get("LOCAL_RANK", 0)) if local_rank is None else local_rank
        )
    if processes is not None:
        threading.Thread(target=_end_with_launcher, name="launcher", daemon=True).start()
    try:
        if processes is None:
            with _used_port_explained(os.environ.get("MASTER_PORT", "")):
                _join_torchrun(backend)
        else:
            assert local_rank is not None
            # Every rank has its share of the cores; more threads than cores only compete.
            torch.set_num_threads(max(1, min(torch.get_num_threads(), cpu_count()) // processes))
            with _used_port_explained(port):
                dist.init_process_group(
                    backend,
                    init_method=f"tcp://127.0.0.1:{port}",
                    rank=local_rank,
                    world_size=processes,
                    timeout=COLLECTIVE,
                )
        function(*args)
    except UserError as error:
        _report(endings, str(error))
        raise
    except Stopped as stopped:
        if endings is None:
            raise
        _report(endings, (stopped.signal, stopped.message))  # and this rank has ended well
    except KeyboardInterrupt:
        if endings is None:
            raise
        _report(endings, (signal.SIGINT, _STOPPED))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _report(endings: Any, ending: object) -> None:
    if endings is not None:
        with suppress(BrokenPipeError):  # the launcher was killed
            endings.put(ending)


def _end_with_launcher() -> None:
    """Stop this rank when its launcher is gone: nobody else would, and ranks of a launcher that was
    killed at the start wait for each other."""
    launcher = parent_process()
    assert launcher is not None
    connection.wait([launcher.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # within the training loop, it saves
    time.sleep(ORPHAN_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _meeting(address: str, others: int) -> Iterator[None]:
    """Print a line while ranks wait for each other within ``with``, and explain a time-out."""
    # A store of torch whose attempt to connect has just timed out makes one more.
    minutes = 2 * MEETING.total_seconds() / 60
    text = f"waiting for {counted(others, 'other rank')} at {address}, up to {minutes:g} minutes"
    try:
        with _native_messages_discarded() as stderr, _later(QUIET, stderr, text):
            yield
    except (RuntimeError, TimeoutError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"The ranks did not meet at {address} ({reason}): check that all were started and that "
            f"this address can be reached, or unset RANK and WORLD_SIZE to run one process."
        ) from None


@contextmanager
def _later(seconds: float, descriptor: int, line: str) -> Iterator[None]:
    """Write a line to a file descriptor if ``with`` takes longer than ``seconds``."""
    timer = threading.Timer(seconds, os.write, [descriptor, f"{line}\n".encode()])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # before the descriptor is closed


@contextmanager
def _native_messages_discarded() -> Iterator[int]:
    """Discard what libraries write to standard error, and yield a descriptor that leads there.

    A store of torch logs each failed attempt to connect with a stack trace in C++.
    """
    try:
        stderr = os.dup(STDERR)
    except OSError:  # closed: nothing is written there anyway
        yield STDERR
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), STDERR)
        yield stderr
    finally:
        os.dup2(stderr, STDERR)
        os.close(stderr)


@contextmanager
def _used_port_explained(port: object) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistNetworkError in newer versions of torch
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {port}, over which the ranks find each other, is in use on this machine: start "
            f"again, under torchrun with another --master-port."
        ) from None


def _join_torchrun(backend: str) -> None:
    """Join the other ranks of this start of the group, not of an earlier one: torchrun keeps its
    store over restarts, with the dead ranks' addresses in it, and reading those hangs (pytorch
    issue 135712)."""
    if os.environ["WORLD_SIZE"] == "1":  # nobody to meet, wherever the address leads
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE
        )
        return
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    others = int(os.environ["WORLD_SIZE"]) - 1
    with _meeting(address, others):
        store, rank, world_size = next(dist.rendezvous("env://", timeout=MEETING))
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    elif restarts and rank == 0 and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        # Each host counts its own restarts, so the count cannot tell starts apart.
        print(
            "warning: a restart may hang: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on "
            "every host",
            file=sys.stderr,
        )
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE
    )
    with _meeting(address, others):
        _wait_for_all(store, rank, world_size)


def _wait_for_all(store: dist.Store, rank: int, world_size: int) -> None:
    """Wait until every rank has joined the group: a rank that fails at once would take its
    connections, and rank 0 the store, from those that are still joining.

    Rank 0, which may hold the store, also waits until the others need it no more.
    """
    for word in ("joined", "ready"):
        store.set(f"{word} {rank}", "")  # needs no answer, unlike add()
        if word == "joined" or rank == 0:
            store.wait([f"{word} {i}" for i in range(world_size)], MEETING)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

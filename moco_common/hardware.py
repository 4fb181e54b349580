"""Cores and memory that this process may use, and its place among the ranks of a launcher."""

from __future__ import annotations

import os
from pathlib import Path

from moco_common.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def cpu_count() -> int:
    """Return the number of cores that this process may use: its affinity and, in a container, the
    quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cpu_quota()
    return max(1, min(count or 1, round(quota))) if quota else count or 1


def _cpu_quota() -> float:
    """Return the cores that the control group (version 2, then 1) allows; 0 without a quota."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # "max" is not a number
        pass
    try:
        quota, period = (
            (_CGROUP / "cpu" / name).read_text()
            for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        return max(0.0, int(quota) / int(period))  # -1 for none
    except (OSError, ValueError):
        return 0.0


def memory_limit() -> tuple[float, str]:
    """Return the bytes of memory that this process may use, and ", the container's limit" if it is
    below the machine's memory."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit = float((_CGROUP / "memory.max").read_text())
    except (OSError, ValueError):
        return total, ""
    return (limit, ", the container's limit") if limit < total else (total, "")


def under_torchrun() -> bool:
    """Return True if ``torchrun`` (or a Slurm job) started this process as one of several ranks.

    Containers often set ``RANK`` and ``WORLD_SIZE`` for one process, without the address of a
    group; these are ignored.

    Raises:
        UserError: the environment names several ranks, but is inconsistent or incomplete.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return False
    text = ", ".join(f"{name}={os.environ.get(name, '')}" for name in _VARIABLES)
    remedy = "start the ranks with torchrun, or unset RANK and WORLD_SIZE to run one process."
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        raise UserError(f"RANK and WORLD_SIZE are no numbers ({text}): {remedy}") from None
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if (rank, world_size) == (0, 1) and missing:
        return False
    if not 0 <= rank < world_size:
        raise UserError(f"RANK is not below WORLD_SIZE ({text}): {remedy}")
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {' and '.join(missing)} are not set: {remedy}"
        )
    return True


def rank() -> int:
    """Return this process's rank, as the launcher set it; 0 without a launcher."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


def restarted() -> bool:
    """Return True if a launcher has restarted this run: ``torchrun`` after the loss of a rank,
    Slurm after a requeue. Such a run resumes from its last checkpoint without ``--resume``.

    torchrun counts restarts on each host, so ranks may disagree; the run resumes if any rank was
    restarted.
    """
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) > 0 for name in counts)

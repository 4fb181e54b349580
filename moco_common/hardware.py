"""Cores and memory that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


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

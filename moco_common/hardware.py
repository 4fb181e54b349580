"""Cores and memory that this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_count() -> int:
    """Cores that this process may use: of its affinity and, in a container, of its quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count or 1, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no quota is set, or it is kept elsewhere
    return count or 1


def _memory_limit() -> tuple[float, str]:
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return total, ""
    return (limit, ", the container's limit") if limit < total else (total, "")

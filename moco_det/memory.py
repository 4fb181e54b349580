"""How much memory a process takes and can take, on a GPU and on a CPU."""

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm


class GPUMemory:
    """Memory that torch holds on the current GPU."""

    def reset(self) -> None:
        """Begin a new peak."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Most bytes that tensors have taken since `reset`."""
        return float(torch.cuda.max_memory_allocated())

    def limit(self) -> float:
        """Bytes that this process may take: its own and what is free."""
        free, _ = torch.cuda.mem_get_info()
        return float(free + torch.cuda.memory_reserved())


class CPUMemory:
    """Resident memory of this process."""

    def reset(self) -> None:
        """Begin a new peak, where the system lets one."""
        with suppress(OSError):  # without it the peak is that of the process's life, no less
            Path("/proc/self/clear_refs").write_text("5")  # Linux's way to start it anew

    def peak(self) -> float:
        """Most bytes that the process has had in memory since `reset`."""
        status = _numbers("/proc/self/status")
        if "VmHWM" in status:
            return status["VmHWM"] * 1024.0
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    def limit(self) -> float:
        """What it has, and its share of what the machine, or the container, has left."""
        free = [_numbers("/proc/meminfo").get("MemAvailable", float("inf")) * 1024]
        for most, used in (  # version 2 of control groups, version 1
            ("memory.max", "memory.current"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
        ):
            try:
                free.append(
                    float(Path("/sys/fs/cgroup", most).read_text())
                    - float(Path("/sys/fs/cgroup", used).read_text())
                )
            except (OSError, ValueError):
                continue  # no such group, or no limit ("max")
        share = min(free) / (comm.get_local_size() if comm.get_world_size() > 1 else 1)
        return _numbers("/proc/self/status").get("VmRSS", 0) * 1024.0 + share


def _numbers(path: str) -> dict[str, int]:
    """``Name:  123 kB`` lines of a file in /proc; nothing where there is none."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {
        words[0].rstrip(":"): int(words[1])
        for words in lines
        if len(words) > 1 and words[1].isdigit()
    }


def agree(value: float, operation: Any) -> float:
    """The greatest or smallest value of all processes."""
    if comm.get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == dist.Backend.NCCL else "cpu"
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=operation)
    return float(tensor.item())


def in_gb(count: float) -> str:
    """Bytes for reading: ``"1.3 GB"``."""
    return f"{count / 1e9:.1f} GB" if count < float("inf") else "more than all"

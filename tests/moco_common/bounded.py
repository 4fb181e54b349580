"""Runs code in a process whose time and memory are bounded."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_bounded(code: str, *, seconds: int = 30, megabytes: int = 300) -> str:
    """Run ``code`` and return its output; it gets so much more memory than after ``import``s.

    ``code`` must call ``bound()`` after its imports.
    """
    start = f"""
import resource, sys
def bound():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = used + {megabytes} * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=ROOT, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

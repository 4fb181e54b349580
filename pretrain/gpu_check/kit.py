"""The parts of the check in order of importance, each in a process of its own with a time limit.

After each part, all results so far are written, so that a check that is cut off leaves them. A part
is a generator function ``part(device, tiny, seconds, folder)`` that yields `Result`s as tuples; it
is named by module, because the parts on fine-tuning belong to another package.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moco_common.files import replace_text
from moco_common.hardware import cpu_count
from moco_common.version import __version__

# What -> the part and its share of the time budget.
PARTS = {
    "equality": ("pretrain.gpu_check.correctness:equality", 0.16),
    "precision and resume": ("pretrain.gpu_check.correctness:precision_and_resume", 0.16),
    "speed of the step": ("pretrain.gpu_check.speed:step", 0.24),
    "fine-tuning": ("moco_det.demo.gpu_check:fine_tuning", 0.2),
    "processes": ("pretrain.gpu_check.correctness:processes", 0.08),
    "data": ("pretrain.gpu_check.speed:data", 0.06),
    "learning": ("pretrain.gpu_check.correctness:learning", 0.1),
}
_READY = "ready\n"  # from a child that has imported its part
_LINE = "result: "  # before the JSON of a result, on a child's standard output


class Result(NamedTuple):
    """One finding of a part.

    Attributes:
        what: a few words.
        found: a number with its unit, as text.
        passed: whether it is as it must be; None for a plain measurement.
    """

    what: str
    found: str
    passed: bool | None = None


def check(folder: Path, *, minutes: float, tiny: bool, say: Callable[[str], None] = print) -> bool:
    """Run all parts; write ``gpu.json`` and ``gpu.md`` to ``folder``.

    Args:
        minutes: time for all parts; what a part does not use is left to the later ones.
        tiny: networks and images of the smallest size, which a CPU can run too.

    Returns:
        Whether everything passed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "minutes": minutes, "tiny": tiny, "parts": {}}
    end, passed = time.monotonic() + 60 * minutes, True
    shares = [share for _, share in PARTS.values()]
    for i, (name, (target, share)) in enumerate(PARTS.items()):
        seconds = max(1.0, (end - time.monotonic()) * share / sum(shares[i:]))
        say(f"{name} (at most {seconds:.0f} s)")
        began, results = time.monotonic(), []
        for result in _part(target, tiny, seconds):
            results.append(result)
            mark = {True: "ok  ", False: "FAIL", None: "    "}[result.passed]
            say(f"{mark}  {result.what:<48} {result.found}")
        passed &= all(result.passed is not False for result in results)
        report["parts"][name] = {
            "seconds": round(time.monotonic() - began, 1),
            "results": [result._asdict() for result in results],
        }
        replace_text(folder / "gpu.json", json.dumps(report, indent=1) + "\n")
        replace_text(folder / "gpu.md", as_page(report))
    say(f"written: {folder / 'gpu.md'} and gpu.json")
    return passed


def machine() -> dict[str, str]:
    """Return what the figures depend on, without user, host or path."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "moco-det": __version__,
        "torch": torch.__version__,
        "GPUs": ", ".join(gpus) or "none: this is a rehearsal on the CPU",
        "cores": f"{cpu_count()} ({platform.machine()})",
    }


def as_page(report: dict[str, Any]) -> str:
    """Format a report as Markdown."""
    lines = ["# Check of the GPU", ""]
    lines += [f"* {name}: {value}" for name, value in report["machine"].items()]
    lines += [f"* budget: {report['minutes']:g} minutes" + ", tiny" * report["tiny"]]
    for name, part in report["parts"].items():
        lines += ["", f"## {name} ({part['seconds']} s)", "", "| what | found | passed |"]
        lines += ["|---|---|---|"]
        words = {True: "yes", False: "**no**", None: ""}
        lines += [f"| {r['what']} | {r['found']} | {words[r['passed']]} |" for r in part["results"]]
    return "\n".join(lines) + "\n"


def _part(target: str, tiny: bool, seconds: float) -> Iterator[Result]:
    """Run a part in a process of its own; yield its results as they come."""
    cut_off = threading.Event()

    def end(child: subprocess.Popen[str]) -> None:
        cut_off.set()
        os.killpg(child.pid, signal.SIGKILL)  # with the processes that it has started

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, target, str(int(tiny)), str(seconds), folder],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        limit = threading.Timer(seconds, end, [child])
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line == _READY:
                    limit.start()  # the time for imports is that of the machine, not of the part
                elif line.startswith(_LINE):
                    yield Result(*json.loads(line.removeprefix(_LINE)))
            code = child.wait()
        finally:
            limit.cancel()
            if child.poll() is None:  # interrupted
                end(child)
                child.wait()
        if cut_off.is_set():
            yield Result("cut off", f"by its limit of {seconds:.0f} s")
        elif code:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
            yield Result("failed", last.replace("|", " ")[:300], False)


def _child(target: str, tiny: str, seconds: str, folder: str) -> None:
    module, _, function = target.partition(":")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    part = getattr(importlib.import_module(module), function)
    print(_READY, end="", flush=True)
    try:
        for result in part(device, bool(int(tiny)), float(seconds), Path(folder)):
            print(_LINE + json.dumps(result), flush=True)
    except Exception:
        traceback.print_exc()  # its last line becomes a result
        sys.exit(1)


if __name__ == "__main__":
    _child(*sys.argv[1:])

"""The doctor's report: all checks of this machine, with advice.

Every check is a function that returns `Finding`s and changes nothing. Detectron2 is examined in a
separate process, since this package never imports it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import torch

from moco_common.hardware import cpu_count
from moco_common.version import TESTED, __version__
from pretrain.doctor.machine import FAILURE, OK, WARNING, Finding, cores, decoding, disk, memory

CV2_PACKAGES = (
    "opencv-python-headless",
    "opencv-python",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)


def examine(folder: Path) -> Iterable[Finding]:
    """Yield all findings, each as soon as it is known; runs would be written to ``folder``."""
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        python_and_packages,
        opencv,
        devices,
        detectron2,
        lambda: cores(cpu_count(), torch.cuda.device_count()),
        memory,
        lambda: disk(folder),
        lambda: [decoding(cpu_count())],
    )
    for check in checks:
        yield from check()


def python_and_packages() -> Iterable[Finding]:
    """Compare versions with the tested range; newer ones may work, older ones pip rejects."""
    oldest, newest = TESTED["python"]
    inside = _key(oldest) <= sys.version_info[:2] <= _key(newest)
    yield Finding(
        "Python",
        OK if inside else WARNING,
        platform.python_version(),
        "" if inside else f"{oldest} to {newest} are tested: use an environment with one of them.",
    )
    for name, (oldest, newest) in TESTED.items():
        if name == "python" or name in CV2_PACKAGES:
            continue
        version = _version(name)
        if version is None:
            yield Finding(name, FAILURE, "not installed", f"pip install {name}")
            continue
        tested = oldest if oldest == newest else f"{oldest} to {newest}"
        key = _key(version.split("+")[0])
        if key < _key(oldest):
            advice = f"pip install '{name}>={oldest}'"
            yield Finding(name, WARNING, f"{version} (tested: {tested})", advice)
        else:
            within = key <= _key(newest)
            yield Finding(name, OK, version if within else f"{version} (tested: {tested})")


def opencv() -> Iterable[Finding]:
    """Check which package `cv2` comes from; several of them overwrite each other's files."""
    names = [name for name in CV2_PACKAGES if _version(name)]
    found = f"{cv2.__version__} from {', '.join(names) or 'a custom build'}"
    if len(names) > 1:
        yield Finding(
            "OpenCV",
            WARNING,
            found,
            f"they overwrite each other: pip uninstall {' '.join(names)}, then install only one.",
        )
    else:
        yield Finding("OpenCV", OK, found)


def devices() -> Iterable[Finding]:
    """Check the GPUs, their memory, and the backends for communication between processes."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        driver = shutil.which("nvidia-smi")
        if built and driver:
            yield Finding(
                "GPU",
                WARNING,
                f"torch is built for CUDA {built} but sees no GPU",
                f"run nvidia-smi: the driver may be too old for CUDA {built}, or "
                "CUDA_VISIBLE_DEVICES hides the GPUs.",
            )
        elif driver:
            yield Finding(
                "GPU", WARNING, "torch is built without CUDA", "install a CUDA build of torch."
            )
        else:
            yield Finding("GPU", OK, "none: everything runs on the CPU; use a narrow network")
        gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
        yield Finding(
            "processes",
            OK if gloo else FAILURE,
            "gloo" if gloo else "torch is built without gloo",
            "" if gloo else "install a build of torch with torch.distributed for --num-gpus.",
        )
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gigabytes = properties.total_memory / 2**30
        bf16 = torch.cuda.is_bf16_supported()
        yield Finding(
            f"GPU {i}",
            OK,
            f"{properties.name}, {gigabytes:.0f} GiB, "
            + ("bfloat16" if bf16 else "no bfloat16: use SOLVER.PRECISION float16"),
        )
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    several = torch.cuda.device_count() > 1
    yield Finding(
        "NCCL",
        OK if nccl else FAILURE if several else WARNING,
        ".".join(map(str, torch.cuda.nccl.version())) if nccl else "missing",
        "" if nccl else "for several GPUs, install a build of torch with NCCL.",
    )


_LOOK_AT_DETECTRON2 = """
import json, warnings
warnings.simplefilter("ignore")
import detectron2
try:
    from detectron2 import _C
    compiled = ""
except ImportError as error:
    compiled = str(error).splitlines()[0]
print(json.dumps([detectron2.__version__, compiled]))
"""


def detectron2() -> Iterable[Finding]:
    """Check which Detectron2 is installed and whether its compiled extension loads."""
    if importlib.util.find_spec("detectron2") is None:
        yield Finding(
            "Detectron2",
            WARNING,
            "not installed",
            "pre-training works without it; for fine-tuning see 'Installation' in the README.",
        )
        return
    done = subprocess.run(
        [sys.executable, "-c", _LOOK_AT_DETECTRON2], capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(
            "Detectron2",
            FAILURE,
            f"cannot be imported: {last}",
            "pip install 'moco-det[detectron2-deps]' installs the dependencies of its Python code.",
        )
        return
    version, missing = json.loads(done.stdout)
    origin = "sal-detectron2" if _version("sal-detectron2") else "upstream or a custom build"
    if missing:
        yield Finding(
            "Detectron2",
            OK,
            f"{version} ({origin}), without its compiled extension",
            "NMS and RoIAlign come from torchvision; deformable convolution, rotated boxes and "
            "COCOeval_opt are missing, but no protocol here needs them.",
        )
    else:
        yield Finding("Detectron2", OK, f"{version} ({origin}), compiled")


def report(findings: Iterable[Finding]) -> str:
    """Format findings and versions as Markdown for a bug report, with no user, host or path."""
    lines = [f"**moco-det {__version__}** on {platform.system()} {platform.machine()}", ""]
    lines += ["| what | state | found |", "|---|---|---|"]
    lines += [f"| {f.what} | {f.state} | {f.found} |" for f in findings]
    names = ("torch", "CUDA", "NCCL", "OMP", "GLOO", "MKL", "DETECTRON2", "SLURM_JOB_NUM_NODES")
    shown = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(names) and "/" not in value
    }
    lines += ["", "Environment: " + (", ".join(f"`{k}={v}`" for k, v in shown.items()) or "none")]
    wanted = ("tensorboard", "matplotlib", "webdataset", "submitit", "hotcoco", "safetensors")
    versions = {name: _version(name) for name in wanted}
    lines.append("Also: " + ", ".join(f"{k} {v or '-'}" for k, v in versions.items()))
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _key(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers, for comparison."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)

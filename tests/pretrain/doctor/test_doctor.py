"""The doctor: what it finds on machines that lack something, and what it tells a bug report."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.doctor import machine
from pretrain.doctor import report as doctor
from tools.doctor import main

ROOT = Path(__file__).parents[3]


def by_name(findings):
    return {finding.what: finding for finding in findings}


def pins(name):
    lines = (ROOT / "requirements" / name).read_text().lower().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_tested_versions_are_those_of_the_two_lists_and_of_the_page():
    oldest_pins, newest_pins = pins("oldest.txt"), pins("constraints.txt")
    page = (ROOT / "docs" / "versions.md").read_text()
    for name, (oldest, newest) in doctor.TESTED.items():
        if name != "python":
            assert (oldest_pins[name], newest_pins[name]) == (oldest, newest), name
        assert re.search(rf"(?mi)^\| {name} \| {oldest} \| {newest} \|$", page), name


@pytest.mark.parametrize(
    ("version", "state", "advice"),
    [("1.13.1", "warning", "pip install 'torch>="), ("2.2.0+cu121", "ok", ""), ("9.0", "ok", "")],
)
def test_a_version_older_than_the_tested_ones_is_a_warning(monkeypatch, version, state, advice):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "torch" else real(name))
    finding = by_name(doctor.python_and_packages())["torch"]
    assert finding.state == state
    assert finding.advice.startswith(advice)
    assert ("tested" in finding.found) == (version in ("1.13.1", "9.0"))


def test_this_machine_passes(tmp_path):
    findings = list(doctor.examine(tmp_path))
    assert not [finding for finding in findings if finding.state == machine.FAILURE]
    found = by_name(findings)
    assert {"Python", "torch", "OpenCV", "Detectron2", "CPU cores", "memory", "disk speed"} <= set(
        found
    )
    assert float(re.match(r"(\d+) images/s", found["views"].found).group(1)) > 1


def test_a_missing_package_is_a_failure_and_the_exit_code_says_so(monkeypatch, capsys, tmp_path):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "fvcore" else real(name))
    assert main(["--output-dir", str(tmp_path)]) == 1
    assert re.search(r"FAIL +fvcore +not installed\n +pip install fvcore", capsys.readouterr().out)


def test_two_opencv_packages_are_named_with_the_mend(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "5.0" if "contrib" not in name else None)
    (finding,) = doctor.opencv()
    assert finding.state == machine.WARNING
    assert "pip uninstall opencv-python-headless opencv-python" in finding.advice


def test_without_detectron2_pretraining_is_still_possible(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (finding,) = doctor.detectron2()
    assert finding.state == machine.WARNING
    assert "pre-training works without it" in finding.advice


def test_a_detectron2_that_cannot_be_imported_is_a_failure(monkeypatch):
    broken = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no module named x")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: broken)
    (finding,) = doctor.detectron2()
    assert finding.state == machine.FAILURE
    assert "no module named x" in finding.found


@pytest.mark.parametrize(
    ("count", "gpus", "state"), [(2, 0, "ok"), (16, 2, "ok"), (4, 8, "warning")]
)
def test_too_few_cores_a_gpu_is_a_warning(count, gpus, state):
    (finding,) = machine.cores(count, gpus)
    assert finding.state == state


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_cores_are_those_that_this_process_may_use():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from moco_common.hardware import cpu_count; print(cpu_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "1", done.stderr


def test_the_report_names_no_folder_and_no_host(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/home/somebody/data")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["--report", "--output-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| torch | ok |" in text
    assert "`OMP_NUM_THREADS=1`" in text
    for private in ("somebody", str(tmp_path), str(Path.home()) + "/", os.uname().nodename):
        assert private not in text

"""What `make` does before it can run anything: find a Python, install, explain each failure.

The Pythons on PATH are stand-ins: they run the real one with another version, or pretend to make an
environment and to install.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = "requirements/set_up_environment.sh"
# A Python of another version; with `-m venv` it copies itself, with `-m pip` it does as told.
PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$1 $2" in
"-c import moco_det"*) exit 0 ;;
"-c import sysconfig"*) echo "$here" ;;
"-c "*) exec {real} -c '
import sys
sys.version_info = {version} + (0, "final", 0)
sys.modules.update(dict.fromkeys({missing}))
exec(sys.argv.pop(1))' "$2" ;;
"-m venv") mkdir -p "$4/bin" && touch "$4/pyvenv.cfg" && cp "$0" "$4/bin/python" ;;
"-m pip") [ "$3" = --version ] && exit
    echo "$*" >>"{folder}/installed"
    cat "{folder}/warning" 2>/dev/null >&2
    case "$*" in *torchvision*) sh "{folder}/fails" ;; esac ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with what the set-up needs of a checkout."""
    for name in (SCRIPT, "moco_common/version.py", "Makefile", "setup.py", ".ci/run"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("constraints.txt", "detectron2.txt"):
        shutil.copy(ROOT / "requirements" / name, tmp_path / "requirements")
    (tmp_path / "path").mkdir()
    (tmp_path / "fails").write_text("exit 0")
    for tool in ("sh", "bash", "make", "dirname", "mkdir", "touch", "cp", "cat", "grep", "rm"):
        (tmp_path / "path" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def add(checkout, name, version, missing=()):
    """Put a stand-in on PATH."""
    file = checkout / "path" / name
    given = {"version": version, "missing": json.dumps(missing), "folder": checkout}
    file.write_text(PYTHON.format(real=sys.executable, **given))
    file.chmod(0o755)


def add_shim(checkout, name):
    """What pyenv puts on PATH for a version that is not selected."""
    file = checkout / "path" / name
    file.write_text(f"#!/bin/sh\necho 'pyenv: {name}: command not found' >&2\nexit 127\n")
    file.chmod(0o755)


def make(checkout, *words):
    env = {"PATH": str(checkout / "path"), "HOME": str(checkout)}
    return subprocess.run(
        ["make", "--no-print-directory", *words],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
    )


def one_sentence(done):
    """The message of a failure, which is all that was printed on stderr but for make's own line."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_the_first_python_that_runs_and_is_supported_is_taken(checkout):
    add_shim(checkout, "python3.13")
    add(checkout, "python3.12", (3, 12))
    add(checkout, "python3.11", (3, 11))
    done = make(checkout, "setup")
    assert (done.returncode, done.stderr) == (0, "")
    assert "with Python 3.12" in done.stdout
    assert "(3, 12)" in (checkout / ".venv/bin/python").read_text()
    assert not (checkout / ".venv/.unfinished").exists()
    steps = (checkout / "installed").read_text().splitlines()
    assert [step.count("constraints.txt") for step in steps] == [1, 1, 1, 0, 1]
    assert "--require-hashes" in steps[3]
    assert make(checkout, "setup").stdout == "make: Nothing to be done for 'setup'.\n"


def test_a_plain_python3_is_taken_last_and_one_without_venv_is_passed_over(checkout):
    add(checkout, "python3.13", (3, 13), missing=["ensurepip"])
    add(checkout, "python3.10", (3, 9))  # whatever its name says
    add(checkout, "python3", (3, 11))
    assert "with Python 3.11" in make(checkout, "setup").stdout


def test_python_names_another_one(checkout):
    add(checkout, "python3.13", (3, 13))
    add(checkout, "mine", (3, 10))
    assert "with Python 3.10" in make(checkout, "setup", "PYTHON=mine").stdout


@pytest.mark.parametrize(
    ("pythons", "words", "message"),
    [
        ({}, [], "no supported Python runs here"),
        ({"python3": (3, 9)}, [], "no supported Python runs here"),
        (
            {"python3.14": (3, 14)},
            ["PYTHON=python3.14"],
            "is Python 3.14, and this project supports",
        ),
        ({"python3": (3, 12)}, ["PYTHON=absent"], "absent does not run: pass PYTHON=FILE"),
    ],
)
def test_without_a_supported_python_one_sentence_says_what_to_do(checkout, pythons, words, message):
    for name, version in pythons.items():
        add(checkout, name, version)
    assert message in one_sentence(make(checkout, "setup", *words))
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_without_the_venv_module_one_sentence_names_the_package(checkout, module):
    add(checkout, "python3.12", (3, 12), missing=[module])
    assert "apt install python3.12-venv" in one_sentence(make(checkout, "setup"))


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left",
            "the disk is full (installing torch and torchvision)",
        ),
        (
            "ERROR: Could not find a version that satisfies torch (from versions: none)"
            "\nERROR: No matching distribution found for torch",
            "the package index cannot be reached",
        ),
        ("ReadTimeoutError: Read timed out.", "the package index cannot be reached"),
    ],
)
def test_a_full_disk_and_a_missing_network_are_one_sentence_and_continue(
    checkout, printed, message
):
    add(checkout, "python3.12", (3, 12))
    (checkout / "fails").write_text(f"echo '{printed}' >&2; exit 1")
    found = one_sentence(make(checkout, "setup"))
    assert message in found
    assert "run make again" in found
    (checkout / ".venv/kept").touch()
    (checkout / "fails").write_text("exit 0")
    done = make(checkout, "setup")
    assert done.returncode == 0
    assert "updating .venv" in done.stdout
    assert (checkout / ".venv/kept").exists()


def test_pips_warnings_are_not_shown_and_its_errors_are(checkout):
    add(checkout, "python3.12", (3, 12))
    (checkout / "warning").write_text(
        "WARNING: Running pip as the 'root' user\n[notice] A new pip\n"
    )
    assert make(checkout, "setup").stderr == ""
    (checkout / ".venv/.installed").unlink()
    (checkout / "fails").write_text("echo 'ERROR: the hashes do not match' >&2; exit 1")
    shown = make(checkout, "setup").stderr.splitlines()
    assert shown[0] == "ERROR: the hashes do not match"
    assert shown[1].startswith("error: installing torch and torchvision: the command failed")


def test_an_installation_that_was_killed_is_redone(checkout):
    add(checkout, "python3.12", (3, 12))
    (checkout / "fails").write_text(f"touch {checkout}/began; sleep 60")
    (checkout / "path" / "sleep").symlink_to(shutil.which("sleep"))
    env = {"PATH": str(checkout / "path")}
    running = subprocess.Popen(
        ["make", "setup"], cwd=checkout, env=env, start_new_session=True, stdout=subprocess.DEVNULL
    )
    while not (checkout / "began").exists():
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert (checkout / ".venv/.unfinished").exists()
    (checkout / "fails").write_text("exit 0")
    done = make(checkout, "setup")
    assert "setting up .venv" in done.stdout
    assert done.returncode == 0
    assert not (checkout / ".venv/.unfinished").exists()


def test_a_working_environment_is_kept_and_never_replaced_by_another_python(checkout):
    add(checkout, "python3.11", (3, 11))
    assert make(checkout, "setup").returncode == 0
    add(checkout, "python3.13", (3, 13))
    (checkout / ".venv/.installed").unlink()
    assert "updating .venv with Python 3.11" in make(checkout, "setup").stdout
    (checkout / ".venv/.installed").unlink()
    refused = one_sentence(make(checkout, "setup", "PYTHON=python3.13"))
    assert "has Python 3.11, not 3.13: run make clean" in refused
    assert "(3, 11)" in (checkout / ".venv/bin/python").read_text()


def test_a_folder_that_is_no_environment_is_not_emptied(checkout):
    add(checkout, "python3.12", (3, 12))
    (checkout / ".venv").mkdir()
    (checkout / ".venv/photos").touch()
    assert "is not a virtual environment" in one_sentence(make(checkout, "setup"))
    assert (checkout / ".venv/photos").exists()


def test_ci_prefers_python_3_11(checkout):
    for name, version in (("python3.13", (3, 13)), ("python3.11", (3, 11))):
        add(checkout, name, version)
    makefile = (checkout / "Makefile").read_text()
    (checkout / "Makefile").write_text(makefile + "\ntest lint docs: setup\n")
    env = {"PATH": str(checkout / "path")}
    shutil.rmtree(checkout / ".venv", ignore_errors=True)
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=checkout, env=env, capture_output=True, text=True
    )
    assert "with Python 3.11" in done.stdout

"""The wheel, unpacked into an empty folder and used from another one."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's content, as an installation lays it out."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, str(source), "-w", str(folder)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(installed, *words):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )


def test_protocols_and_recipes_travel_inside_the_wheel(installed):
    code = (
        "import moco_det, pretrain.config.defaults as p, moco_det.config.protocols as d;"
        "print(moco_det.__file__); print(p.recipe_names(), d.protocol_names());"
        "print(p.load_config('moco-v2').MOCO.MLP, d.get_protocol('VOC').SOLVER.MAX_ITER)"
    )
    done = run(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    assert "'moco-v1', 'moco-v2'" in done.stdout
    assert "'VOC'" in done.stdout
    assert done.stdout.splitlines()[-1] == "True 24000"


def test_every_page_template_is_inside_the_wheel(installed):
    packages = ("moco_common", "pretrain", "moco_det")
    templates = [path for name in packages for path in (ROOT / name).rglob("*.j2")]
    assert len(templates) >= 4
    for template in templates:
        assert (installed / template.relative_to(ROOT)).read_bytes() == template.read_bytes()


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("train_net", "add MODEL.WEIGHTS FILE"),
        ("pretrain", "--data is missing"),
    ],
)
def test_command_lines_start_from_the_installed_package(installed, tool, message):
    config = {"train_net": "VOC", "pretrain": "moco-v1"}[tool]
    done = run(installed, "-m", f"moco_tools.{tool}", "--config", config)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    as_file = run(installed, installed / "moco_tools" / f"{tool}.py", "--config", config)
    assert message in as_file.stderr


def test_every_command_line_is_a_console_script(installed):
    (metadata,) = installed.glob("*.dist-info")
    scripts = (metadata / "entry_points.txt").read_text()
    for tool in (ROOT / "tools").glob("[a-z]*.py"):
        name = tool.stem.removesuffix("_run").replace("_", "-")
        assert f"moco-{name} = moco_tools.{tool.stem}:main" in scripts


def test_nothing_that_a_user_has_would_be_replaced(installed):
    """torch has a range and Detectron2 is not required: pip has nothing to exchange."""
    (metadata,) = installed.glob("*.dist-info")
    requirements = [
        line.split(":", 1)[1].strip()
        for line in (metadata / "METADATA").read_text().splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    lines = (ROOT / "requirements" / "oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if "==" in line)
    for requirement in requirements:  # each lower bound is a version that was tested
        name, bound = requirement.split(">=")
        assert Version(bound) == Version(oldest[name]), name
    assert "torch" in {requirement.split(">=")[0] for requirement in requirements}
    assert not [
        r for r in requirements if "detectron2" in r or "opencv" in r or "==" in r or "<" in r
    ]


@pytest.mark.parametrize("package", ["pretrain", "moco_det"])
def test_without_opencv_one_sentence_says_how_to_get_it(installed, package):
    done = run(installed, "-c", f"import sys; sys.modules['cv2'] = None; import {package}")
    assert done.returncode == 1
    assert "pip install opencv-python-headless" in done.stderr.strip().splitlines()[-1]


def test_without_detectron2_one_sentence_says_how_to_get_it_and_pretrain_works(installed):
    block = "import sys; sys.modules['detectron2'] = None; "
    block += "import pretrain.engine.train_loop; import moco_det"
    done = run(installed, "-c", block)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "moco_common.dependencies.MissingPackageError: moco_det needs Detectron2"
    )
    assert "pretrain" not in done.stderr.replace("import pretrain.engine.train_loop", "")


@pytest.mark.parametrize(
    ("tool", "words", "module", "advice"),
    [
        ("train_net", ["--config", "VOC"], "detectron2", "'Installation' in the README"),
        ("pretrain", ["--config", "moco-v1"], "cv2", "pip install opencv-python-headless"),
    ],
)
def test_a_tool_without_such_a_package_ends_in_that_sentence(
    installed, tool, words, module, advice
):
    code = f"import sys; sys.modules[{module!r}] = None; from moco_tools.{tool} import main;"
    done = run(installed, "-c", f"{code} sys.exit(main({words!r}))")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert advice in done.stderr


def contents(site):
    """The packages' files in a folder, below it."""
    files = {path.relative_to(site) for path in site.rglob("*.*") if path.suffix != ".pyc"}
    return {path for path in files if not path.parts[0].endswith(".dist-info")}


def copied_into_the_container(folder):
    """The files that the Containerfile's COPY lines put into its working folder, laid out there."""
    for line in re.findall(r"(?m)^COPY (.+)$", (ROOT / "Containerfile").read_text()):
        *sources, target = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, folder / target, ignore=ignored)
            else:
                (folder / target).mkdir(exist_ok=True)
                shutil.copy(ROOT / source, folder / target)
    return folder


def test_the_container_copies_all_that_its_setup_needs(installed, tmp_path):
    """From those files make finds each prerequisite, and the wheel is that of the checkout."""
    folder = copied_into_the_container(tmp_path)
    planned = subprocess.run(["make", "--dry-run", "setup"], cwd=folder, capture_output=True)
    assert planned.returncode == 0, planned.stderr
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-lib", "built"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert contents(folder / "built") == contents(installed)


@pytest.mark.skipif(not HADOLINT.exists(), reason="no wheel of hadolint for this platform")
def test_the_container_file_is_lint_free():
    done = subprocess.run([HADOLINT, ROOT / "Containerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

"""Command lines start without torch and Detectron2; what importing moco_det still promises."""

import argparse
import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moco_det.config
from moco_det.config.defaults import default_config, flatten, key_names

ROOT = Path(__file__).parents[1]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("[a-z]*.py"))
HEAVY = ("torch", "detectron2", "matplotlib", "cv2")
RUN = """
import sys
from tools import {tool}
try:
    status = {tool}.main({words!r})
except SystemExit as exit:
    status = exit.code
print()
print(status, *sorted({heavy!r} & sys.modules.keys()))
"""
# (tool, its arguments, exit status, words of the message)
MISTAKES = [
    *((tool, ["--no-such-flag"], 2, "usage: ") for tool in TOOLS),
    ("data", ["./absent"], 1, "absent does not exist"),
    ("data", ["voc:DIR", "--split", "80%"], 1, "--split needs --to-coco"),
    ("data", ["voc:DIR", "coco:DIR", "--sheet", "a.png"], 1, "take one SPEC"),
    ("data", ["voc:DIR", "--to-coco", "a.txt"], 1, "must end in .json"),
    ("convert", ["absent.pth"], 1, "absent.pth does not exist"),
    ("export", ["--run", "absent", "-o", "out.onnx"], 1, "absent does not exist"),
    ("export", ["--run", ".", "-o", "out.tflite"], 1, "should end in .onnx or .pt"),
    ("inspect_run", ["absent"], 1, "absent does not exist"),
    ("predict", ["absent.jpg", "--run", "run", "-o", "out"], 1, "absent.jpg does not exist"),
    ("predict", [".", "--config", "VOX", "--weights", ".", "-o", "out"], 1, "did you mean VOC?"),
    ("predict", [".", "-o", "out"], 2, "give either --run"),
    ("pretrain", [], 1, "--config is missing"),
    ("pretrain", ["--config", "moco-v3"], 1, "did you mean moco-v2?"),
    ("pretrain", ["--config", "moco-v2"], 1, "--data is missing"),
    ("pretrain", ["--config", "moco-v2", "--data", "absent"], 1, "absent does not exist"),
    ("pretrain", ["--config", "moco-v2", "SOLVER.EPOCH", "1"], 1, "SOLVER.EPOCHS"),
    ("pretrain", ["--explain", "SOLVER.EPOCH"], 1, "SOLVER.EPOCHS"),
    ("probe", ["absent.pth", "--train", "."], 1, "absent.pth does not exist"),
    ("probe", ["random", "--train", "absent"], 1, "absent does not exist"),
    ("report", ["absent", "-o", "out"], 1, "absent does not exist"),
    ("runs", ["absent"], 1, "absent does not exist"),
    ("train_net", [], 1, "name a protocol or a file with --config"),
    ("train_net", ["--config", "VOX"], 1, "did you mean VOC?"),
    ("train_net", ["--config", "absent.yaml"], 1, "absent.yaml"),
    ("train_net", ["--config", "VOC", "SOLVER.MAX_ITR", "1"], 1, "SOLVER.MAX_ITER"),
    ("train_net", ["--config", "VOC", "SOLVER.MAX_ITER"], 1, "has no partner"),
    ("train_net", ["--explain", "SOLVER.MAX_ITR"], 1, "SOLVER.MAX_ITER"),
]


def run(tool, words):
    """Exit status, heavy modules that were imported, and what was printed."""
    code = RUN.format(tool=tool, words=words, heavy=set(HEAVY))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    status, *imported = done.stdout.splitlines()[-1].split()
    return int(status), imported, done.stdout + done.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_nothing_heavy(tool):
    status, imported, printed = run(tool, ["--help"])
    assert (status, imported) == (0, [])
    assert f"usage: moco-{tool.removesuffix('_run').replace('_', '-')} " in printed


@pytest.mark.parametrize(("tool", "words", "status", "message"), MISTAKES)
def test_a_usage_error_is_reported_before_anything_heavy_is_imported(tool, words, status, message):
    found, imported, printed = run(tool, words)
    assert (found, imported) == (status, [])
    assert message in printed
    assert "Traceback" not in printed


def test_the_keys_read_from_the_source_are_those_of_the_config():
    assert sorted(key_names()) == sorted(flatten(default_config()))


MODULES = [module.name for module in pkgutil.iter_modules(moco_det.config.__path__)]
FIRST = [
    *("import detectron2.modeling, moco_det", "import moco_det, detectron2.modeling"),
    *("import moco_det, detectron2.engine", "import moco_det.conversion.proof"),
    *("import moco_det.modeling.detector", "import moco_det.modeling.roi_heads"),
    *(f"import moco_det.config.{name}, detectron2.modeling" for name in MODULES),
]


@pytest.mark.parametrize("first", FIRST)
def test_heads_and_backbones_are_registered_whatever_is_imported_first(first):
    code = (
        first
        + """
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, SEM_SEG_HEADS_REGISTRY
BACKBONE_REGISTRY.get("build_resnet_dc5_backbone")
ROI_HEADS_REGISTRY.get("Res5ROIHeadsExtraNorm")
SEM_SEG_HEADS_REGISTRY.get("FCNHead")
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    # Detectron2's own import warns where it comes before moco_det.
    assert done.returncode == 0, done.stderr
    assert first.startswith("import detectron2") or done.stderr == ""


def test_every_exported_name_is_there_and_any_other_is_an_attribute_error():
    for name in moco_det.__all__:
        assert getattr(moco_det, name).__name__ == name
        assert name in dir(moco_det)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        moco_det.absent  # noqa: B018


def options(tool):
    """``(name, help text)`` of everything on a command line."""
    parser = importlib.import_module(f"tools.{tool}").parser()
    assert isinstance(parser, argparse.ArgumentParser)
    for action in parser._actions:
        yield (action.option_strings or [action.dest])[-1], action.help


def faults_of_help(text):
    """What is wrong with a help text."""
    if not text:
        return ["missing"]
    faults = [f"begins with {word}" for word in ("of", "how") if re.match(rf"{word}\b", text, re.I)]
    faults += ["ends with a period"] if text.endswith(".") and not text.endswith("...") else []
    faults += ["begins with a bracket"] if text.startswith("(") else []
    return faults


@pytest.mark.parametrize("tool", TOOLS)
def test_every_option_has_a_help_text_in_the_same_form(tool):
    faults = {name: faults_of_help(text) for name, text in options(tool)}
    assert not {name: found for name, found in faults.items() if found}


def test_a_help_text_in_another_form_is_found():
    assert faults_of_help(None) == ["missing"]
    assert faults_of_help("of their votes") == ["begins with of"]
    assert faults_of_help("How many images.") == ["begins with how", "ends with a period"]
    assert faults_of_help("(that of the run)") == ["begins with a bracket"]
    assert faults_of_help("offset of the seed, 1, 2, ...") == []


CHECKED_DOCSTRINGS = ("moco_common", "pretrain", "moco_det")
NO_BEGINNING = ("Of ", "How ", "What ", "Whether ")


def faults_of_docstrings(source):
    """First sentences of docstrings that are not an imperative or a noun phrase with a period."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            first = " ".join(text.split("\n\n")[0].split())
            if not first.endswith((".", ":", "::")) or first.startswith(NO_BEGINNING):
                yield first


@pytest.mark.parametrize("package", CHECKED_DOCSTRINGS)
def test_a_docstring_begins_with_a_sentence(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not list(faults_of_docstrings(path.read_text(encoding="utf-8"))), path


def test_a_docstring_in_another_form_is_found():
    source = '"""Of a run."""\ndef f(): "Count them"\ndef g(): "Is it\\nthere?"\ndef h(): "Do it."'
    assert list(faults_of_docstrings(source)) == ["Of a run.", "Count them", "Is it there?"]

"""YAML is data whose cost its size bounds."""

import os

import pytest
import yaml

from moco_common.config import parse_yaml, read_yaml
from moco_common.errors import UserError
from tests.moco_common.bounded import run_bounded

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {x0: 1, y0: 2}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n  x{i}: 1\n" for i in range(1, 40)
)
EXPENSIVE = {
    "aliases": ALIASES,
    "merges": MERGES,
    "an alias inside itself": "a: &a [1, *a]\n",
    "a mapping inside itself": "a: &a\n  b: *a\n",
    "deep lists": "a: " + "[" * 100_000,
    "deep and closed": "a: " + "[" * 60 + "]" * 60,
    "deep mappings": "a: " + "{b: " * 5_000,
    "many values": "a: [" + "1," * 200_000 + "]",
    "a long integer": "a: " + "1" * 500_000,
    "a long hexadecimal": "a: 0x" + "f" * 500_000,
    "a long sexagesimal": "a: 1" + ":59" * 100_000,
    "a large file": "a: " + "x" * (2 << 20),
    "no date": "a: 2024-99-99\n",
    "no integer": "a: !!int ''\n",
    "no truth value": "a: !!bool x\n",
    "no timestamp": "a: !!timestamp x\n",
    "a Python tag": "a: !!python/object/apply:os.system [true]\n",
}


def test_time_and_memory_are_bounded(tmp_path):
    for number, text in enumerate(EXPENSIVE.values()):
        (tmp_path / f"{number:02}.yaml").write_text(text)
    out = run_bounded(
        f"""
import time
from pathlib import Path
from moco_common.config import read_yaml
from moco_common.errors import UserError
bound()
for path in sorted(Path({str(tmp_path)!r}).glob("*.yaml")):
    began = time.process_time()
    try:
        read_yaml(path)
        print("read", path)
    except UserError as error:
        assert str(error).count("\\n") == 0 and len(str(error)) < 400, error
        print("refused")
    assert time.process_time() - began < 10, path
""",
        seconds=100,
    )
    assert out.split() == ["refused"] * len(EXPENSIVE), list(EXPENSIVE)


def test_values_lines_and_aliases_are_those_of_pyyaml(tmp_path):
    text = (
        "A: &a\n  B: [1, 2.5, 0x10, on]\n  C: 'x'\nD: *a\nE:\n  <<: *a\n  C: y\n"
        "F: 2024-01-02\nG: !!binary aGVsbG8=\nH: null\n"
    )
    (tmp_path / "a.yaml").write_text(text)
    values, lines = read_yaml(tmp_path / "a.yaml")
    assert values == yaml.safe_load(text) == parse_yaml(text)
    assert (lines["A.B"], lines["D"], lines["E.C"], lines["H"]) == (2, 4, 7, 10)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_states_nothing(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == ({}, {})


def test_two_documents_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("A: 1\n---\nA: 2\n")
    with pytest.raises(UserError, match="line 2"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "a.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError, match="cannot read the config"):
        read_yaml(path)

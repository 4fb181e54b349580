"""Run directories with huge numbers, NaN or text where numbers belong: a report or one sentence."""

import json
import random

import pytest
import yaml

from moco_common.errors import UserError
from moco_det.report import build
from moco_det.report.runs import read_runs
from tests.moco_det.report_cases import two_groups, write_pretraining, write_run

ODD = [10**400, -1, 2**63, 1e308, float("nan"), float("inf"), "text", "", "\ud800x", None, True]
ODD += [[], {}, [[1]], {"a": 1}]


def places(tree, at=()):
    yield at
    pairs = (
        tree.items() if isinstance(tree, dict) else enumerate(tree if type(tree) is list else [])
    )
    for key, value in pairs:
        yield from places(value, (*at, key))


def with_value(tree, at, value):
    if not at:
        return value
    copy = type(tree)(tree)
    copy[at[0]] = with_value(tree[at[0]], at[1:], value)
    return copy


def report_on(root, out):
    """True for a report, False for one sentence; anything else is raised."""
    try:
        report = build.build_report(read_runs(sorted(root.iterdir())), num_images=0)
        report.write(out)
        report.summary().encode()
    except UserError as error:
        if "\n" in str(error):
            raise
        return False
    assert json.loads((out / "report.json").read_text())
    return True


@pytest.mark.parametrize(
    "name",
    ["a-seed0/results.json", "a-seed0/config.yaml", "p/config.yaml", "a-seed0/metrics.json",
     "p/metrics.json"],
)  # fmt: skip
def test_odd_values_in_a_run_are_reported_or_refused_in_a_sentence(tmp_path, name):
    runs = tmp_path / "runs"
    write_run(runs / "a-seed0")
    write_run(runs / "a-seed1", 41.0, 1)
    write_pretraining(runs / "p", steps=5)
    file = runs / name
    text = file.read_text()
    tree = yaml.safe_load(text.splitlines()[-1] if "metrics" in name else text)
    reported = 0
    rng = random.Random(0)
    for at in places(tree):
        for value in rng.sample(ODD, 4):
            odd = with_value(tree, at, value)
            content = yaml.safe_dump(odd) if file.suffix == ".yaml" else json.dumps(odd)
            if "metrics" in name:
                content = "".join(f"{line}\n" for line in (*text.splitlines()[:-1], content))
            file.write_text(content)
            reported += report_on(runs, tmp_path / "out")
    assert reported > 5


def test_odd_values_in_predictions_are_reported_or_refused_in_a_sentence(tmp_path):
    paths = two_groups(tmp_path / "runs", predictions=True)
    for path in paths[1:]:
        (path / "inference/coco_instances_results.json").unlink()
    file = paths[0] / "inference/coco_instances_results.json"
    tree = json.loads(file.read_text())
    rng = random.Random(0)
    for at in places(tree[:1]):
        for value in rng.sample(ODD, 4):
            file.write_text(json.dumps(with_value(tree, at, value)))
            assert report_on(tmp_path / "runs", tmp_path / "out")

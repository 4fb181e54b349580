"""The overview of runs: what each directory holds, sorted, filtered, as text and as JSON."""

import json
import os
from pathlib import Path

import pytest
import yaml

from moco_common.errors import UserError
from moco_det.report.list_runs import NAMES, arrange, as_table, list_runs
from tools.runs import main

OLD_RUNS = Path(__file__).parents[2] / "old_runs"


def pretraining(folder, *, iteration, seed=0, knn=None, method="moco", **solver):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"METHOD": method, "SEED": seed, "MODEL": {"WEIGHTS": "w.pth" if seed else ""}}
    solver = {"MAX_ITER": 0, "EPOCHS": 10, "BATCH_SIZE": 5} | solver
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"SOLVER": solver}))
    record = {"iteration": iteration, "epoch": iteration / 4, "loss": 1.0}
    record |= {} if knn is None else {"knn_top1": knn}
    (folder / "metrics.json").write_text(json.dumps(record) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three pre-training runs, one of them within another's folder, and what is no run."""
    pretraining(tmp_path / "b", iteration=40, knn=31.5)
    pretraining(tmp_path / "a" / "deep", iteration=20, seed=1, knn=44.0, method="byol")
    pretraining(tmp_path / "a", iteration=7, MAX_ITER=9)
    (tmp_path / "a" / "inspection").mkdir()
    (tmp_path / "a" / "inspection" / "metrics.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").write_text("name: something else\n")
    return tmp_path


def test_each_run_is_listed_once_with_what_its_files_say(runs):
    rows = {row.run: row for row in list_runs(runs)}
    assert list(rows) == ["a", "a/deep", "b"]
    a, deep, b = rows.values()
    assert {row.kind for row in rows.values()} == {"pre-training"}
    assert (a.state, a.iteration, a.iterations, a.score) == ("stopped", 7, 9, None)
    assert (b.state, b.iteration, b.iterations, b.score) == ("done", 40, 40, 31.5)
    assert (deep.setting, deep.weights, deep.seed) == ("byol", "w.pth", 1)
    assert (b.weights, b.metric, b.seconds) == ("random", "kNN", None)


def test_a_run_of_detectron2_shows_its_protocol_ap_and_length():
    (row,) = (row for row in list_runs(OLD_RUNS) if row.run == "detection")
    results = json.loads((OLD_RUNS / "detection" / "results.json").read_text())
    assert (row.kind, row.setting, row.state) == ("fine-tuning", "VOC-small", "done")
    assert (row.metric, row.score) == ("AP", pytest.approx(results["bbox"]["AP"]))
    assert (row.iteration, row.iterations, row.seed) == (200, 200, 1)


def test_a_held_lock_means_running_and_a_stale_one_does_not(runs):
    lock = runs / "a" / "run.lock"
    lock.write_text('{"host": "x", "pid": 1}\n')
    assert {row.run: row.state for row in list_runs(runs)}["a"] == "running"
    os.utime(lock, (1, 1))
    assert {row.run: row.state for row in list_runs(runs)}["a"] == "stopped"
    lock.write_text("")  # as a run that has ended leaves it
    assert {row.run: row.state for row in list_runs(runs)}["a"] == "stopped"


def test_the_time_reaches_from_the_first_start_to_the_last_record(runs):
    for start in (1_700_000_500, 1_700_000_000):
        (runs / "b" / f"events.out.tfevents.{start}.host.1.0").touch()
    os.utime(runs / "b" / "metrics.json", (1_700_003_661, 1_700_003_661))
    row = {row.run: row for row in list_runs(runs)}["b"]
    assert row.seconds == 3661
    assert "1:01:01" in as_table([row])


def test_rows_are_sorted_with_gaps_last_and_filtered_by_all_conditions(runs):
    rows = list_runs(runs)
    assert [row.run for row in arrange(rows, [], "score")] == ["b", "a/deep", "a"]
    assert [row.run for row in arrange(rows, [], "-score")] == ["a/deep", "b", "a"]
    assert [row.run for row in arrange(rows, ["setting=MOCO"])] == ["a", "b"]
    assert [row.run for row in arrange(rows, ["setting=moco", "state=done"])] == ["b"]
    with pytest.raises(UserError, match=r"--sort ap is not a column: choose one of run, kind"):
        arrange(rows, [], "ap")
    with pytest.raises(UserError, match=r"--filter done is not NAME=TEXT"):
        arrange(rows, ["done"])


def test_the_command_prints_a_table_or_json(runs, capsys):
    assert main([str(runs), "--sort=-score"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "run kind state setting weights seed score iteration time".split()
    assert lines[2].split()[:3] == ["a/deep", "pre-training", "stopped"]
    assert lines[-1] == "3 runs"
    assert main([str(runs), "--json", "--filter", "run=deep"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert tuple(row) == NAMES
    assert (row["score"], row["iterations"]) == (44.0, 40)


def test_damaged_files_leave_gaps_and_no_traceback(runs, capsys):
    (runs / "a" / "metrics.json").write_bytes(b"\xff\xfe not json")
    (runs / "b" / "config.yaml").write_text("METHOD: [moco\n")
    assert main([str(runs)]) == 0
    assert "3 runs" in capsys.readouterr().out

"""Experiment trackers get what metrics.json holds, offline; one that fails does not end the run."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from moco_common.errors import UserError
from moco_det.engine import trackers
from moco_det.engine.trackers import Tracker, TrackerWriter, build_trackers, check_trackers
from tests.conftest import NARROW, QUICK
from tools.train_net import main


def command(voc_dir, folder, *more):
    data = ["--train-data", f"voc:{voc_dir}:trainval", "--test-data", f"voc:{voc_dir}:test"]
    settings = [*NARROW, *QUICK, "SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2"]
    settings += ["SOLVER.CHECKPOINT_PERIOD", "2", "TEST.PRECISE_BN.NUM_ITER", "1"]
    line = ["--config", "VOC-random", *data, "--output-dir", str(folder)]
    return [*line, *more, *settings]


def recorded(folder):
    """Losses, rates and AP of metrics.json by iteration."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {
        (line["iteration"], key): value
        for line in lines
        for key, value in line.items()
        if key in ("total_loss", "lr", "bbox/AP", "bbox/AP50")
    }


@pytest.fixture
def sent(monkeypatch):
    """Rows sent to a tracker of this test's own, installed as wandb; and the runs opened."""
    rows, opened = [], []

    def open_run(folder, config, known):
        opened.append((folder.name, config["SOLVER.MAX_ITER"], known))
        send = lambda row, step: rows.append((step, dict(row)))  # noqa: E731
        return Tracker(known or "abc", send, lambda: rows.append("closed"), OSError)

    monkeypatch.setitem(trackers.TRACKERS, "wandb", open_run)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__spec__=SimpleNamespace()))
    return rows, opened


def test_a_tracker_gets_every_scalar_of_the_record_once(voc_dir, tmp_path, sent):
    rows, opened = sent
    assert main(command(voc_dir, tmp_path / "run", "--log", "wandb")) == 0
    assert opened == [("run", 4, None)]
    assert rows.pop() == "closed"
    found = {(step, key): value for step, row in rows for key, value in row.items()}
    assert len(found) == sum(len(row) for _, row in rows)  # nothing twice
    expected = recorded(tmp_path / "run")
    assert {key for _, key in expected} >= {"total_loss", "lr", "bbox/AP"}
    for key, value in expected.items():
        if value == value:  # NaN is not sent
            assert found[key] == pytest.approx(value), key
    (tmp_path / "run" / "model_final.pth").unlink()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    rows.clear()
    assert main([*command(voc_dir, tmp_path / "run", "--log", "wandb"), "--resume"]) == 0
    assert opened[1] == ("run", 4, "abc")  # the same run there
    assert min(step for step, _ in rows[:-1]) == 2


def test_a_tracker_that_fails_is_left_with_a_warning(caplog):
    calls = []

    def send(row, step):
        calls.append(step)
        raise OSError("no route to host")

    writer = TrackerWriter("wandb", Tracker("x", send, lambda: calls.append("closed"), OSError), 0)
    with EventStorage(0) as storage:
        for _ in range(3):
            storage.put_scalar("loss", 1.0)
            writer.write()
            storage.step()
    writer.close()
    assert calls == [0]
    assert "wandb failed and gets no more records: no route to host" in caplog.text


def test_a_bug_of_ours_is_not_taken_for_a_tracker_that_fails():
    def send(row, step):
        raise ZeroDivisionError

    writer = TrackerWriter("wandb", Tracker("x", send, lambda: None, OSError), 0)
    with EventStorage(0) as storage:
        storage.put_scalar("loss", 1.0)
        with pytest.raises(ZeroDivisionError):
            writer.write()


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("moco_common.dependencies.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--log mlflow needs .*moco-det\[mlflow\]"):
        check_trackers(["mlflow"])
    with pytest.raises(UserError, match="--log visdom is unknown: there are wandb and mlflow"):
        check_trackers(["visdom"])


def write_two(folder, name, start_iter=0):
    (writer,) = build_trackers(
        [name], folder, {"SOLVER.BASE_LR": 0.02, "OUTPUT_DIR": ""}, start_iter
    )
    with EventStorage(start_iter) as storage:
        for value in (3.0, float("nan")):
            storage.put_scalar("total_loss", value)
            storage.put_scalar("bbox/AP-a (b)", 50.0 + storage.iter, smoothing_hint=False)
            writer.write()
            storage.step()
    writer.close()
    return json.loads((folder / "trackers.json").read_text())[name]


def test_mlflow_keeps_metrics_and_settings_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install 'moco-det[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    (tmp_path / "run").mkdir()
    number = write_two(tmp_path / "run", "mlflow")
    assert write_two(tmp_path / "run", "mlflow", start_iter=2) == number
    run = mlflow.MlflowClient().get_run(number)
    assert run.data.params["SOLVER.BASE_LR"] == "0.02"
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    history = mlflow.MlflowClient().get_metric_history(number, "bbox/AP-a _b_")
    assert [(m.step, m.value) for m in history] == [(i, 50.0 + i) for i in range(4)]
    losses = mlflow.MlflowClient().get_metric_history(number, "total_loss")
    assert [(m.step, m.value) for m in losses if m.step < 1] == [(0, 3.0)]


def test_wandb_keeps_its_record_in_the_run_directory_when_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'moco-det[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    number = write_two(tmp_path, "wandb")
    assert write_two(tmp_path, "wandb", start_iter=2) == number
    files = [path for path in Path(tmp_path).rglob("*.wandb") if number in path.name]
    assert files
    content = b"".join(path.read_bytes() for path in files)
    assert b"total_loss" in content
    assert b"SOLVER.BASE_LR" in content

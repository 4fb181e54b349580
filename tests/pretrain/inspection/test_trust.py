"""What a run's files say is data: nothing in them is executed, fetched or written to unasked."""

import json
import os
import shutil

import pytest
import yaml

from pretrain.checkpoint import format as checkpoint
from pretrain.engine.train_loop import train
from tests.pretrain.probe_data import write_classes
from tests.pretrain.runs import run as pretrain
from tests.pretrain.tiny import recipe
from tools.inspect_run import main


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("photographs") / "classes", 5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photographs):
    out = tmp_path_factory.mktemp("run")
    train(recipe("moco-v2", photographs, out, "MOCO.QUEUE_SIZE", "12"), quiet=True)
    return out


def look(*words):
    return main([str(word) for word in (*words, "--workers", "1", "--images", "4", "-k", "1")])


def hostile_specs(proof):
    return [
        f"shards:pipe:touch {proof}",
        f"shards:pipe:touch {proof}; cat /dev/null #{{000..003}}.tar",
        f"shards:gs://x'; touch {proof}; '/a.tar",
        f"shards:https://127.0.0.1:9/$(touch {proof}).tar",
        "shards:/tmp/{000000..999999999}.tar",
        f" shards:pipe:touch {proof}",
        f"pipe:touch {proof}",
        f"http://127.0.0.1:9/{proof}",
        {"shards": f"pipe:touch {proof}"},
        7,
    ]


def run_of(tmp_path, trained, spec, kind):
    """A run directory, or a checkpoint alone, whose files name ``spec`` as the images."""
    folder = tmp_path / "received"
    if kind == "two lines":
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"METHOD": "moco", "DATA": [spec]}))
        return folder
    state = checkpoint.load(trained / checkpoint.LAST)
    config = yaml.safe_load(state["config"]) | {"DATA": [spec]}
    path = checkpoint.save({**state, "config": yaml.safe_dump(config)}, folder)
    return path if kind == "checkpoint" else folder


@pytest.mark.parametrize("kind", ["two lines", "directory", "checkpoint"])
@pytest.mark.parametrize("number", range(10))
def test_images_that_a_run_names_are_opened_only_if_they_are_local_files(
    tmp_path, trained, photographs, capsys, kind, number
):
    spec = hostile_specs(tmp_path / "executed")[number]
    received = run_of(tmp_path, trained, spec, kind)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert look(received) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--data" in error
    assert "--no-images" in error
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert look(received, "--data", photographs) == 0  # the user's word
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["inspection", "inspection/features"])
def test_a_link_in_a_run_does_not_choose_where_results_go(tmp_path, trained, capsys, name):
    received = shutil.copytree(trained, tmp_path / "received")
    (tmp_path / "private").mkdir()
    (received / name).parent.mkdir(exist_ok=True)
    os.symlink(tmp_path / "private", received / name)
    assert look(received) == 1
    assert "-o" in capsys.readouterr().err
    assert not list((tmp_path / "private").iterdir())


def test_a_resumed_run_executes_the_command_it_was_started_with_and_no_other(tmp_path, photographs):
    tar = tmp_path / "photographs.tar"
    shutil.make_archive(str(tar.with_suffix("")), "tar", photographs)
    (tmp_path / "cache").mkdir()
    words = ["--output-dir", tmp_path / "run", *RUN]
    first = ["--data", f"shards:pipe:cat {tar}", *words]
    cache = {"XDG_CACHE_HOME": tmp_path / "cache"}
    code, text = pretrain(*first, "SOLVER.MAX_ITER", 2, **cache)
    assert code == 0, text
    other = f"shards:pipe:touch {tmp_path / 'executed'}; cat {tar}"
    code, text = pretrain("--resume", "--data", other, *words, **cache)
    assert code == 1
    assert "is not the command of" in text
    assert "Traceback" not in text
    assert not (tmp_path / "executed").exists()
    code, text = pretrain("--resume", *first, "SOLVER.MAX_ITER", 3, **cache)
    assert code == 0, text
    assert f"data: shards:pipe:cat {tar}" in text
    records = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert [json.loads(record)["iteration"] for record in records] == [1, 2, 3]


RUN = (
    "MODEL.DEPTH 18 MODEL.WIDTH 0.0625 MODEL.BN_GROUPS 2 INPUT.CROP_SIZE 32 MOCO.DIM 8 "
    "MOCO.QUEUE_SIZE 12 SOLVER.BATCH_SIZE 8 LOG.PERIOD 1 DATALOADER.NUM_WORKERS 0"
).split()

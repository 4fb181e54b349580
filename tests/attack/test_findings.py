"""What the attack found, one ordinary test for each root."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from moco_common import images
from moco_common.config import LimitError, parse_yaml
from moco_common.errors import MEMORY, UserError, run_tool
from moco_common.files import parse_json, read_json, read_text, replace_text
from moco_common.launch import launch
from moco_common.reader.errors import CheckpointError
from moco_common.reader.formats import Discarded, read_checkpoint
from moco_det import api
from moco_det.checkpoint import backbone_weights
from moco_det.checkpoint.backbone_weights import read_backbone
from moco_det.checkpoint.detector_weights import load_detector
from moco_det.checkpoint.run_checkpointer import RunCheckpointer
from moco_det.config.protocols import load_config
from moco_det.data.datasets.coco import read_coco
from moco_det.data.datasets.findings import DatasetReport
from moco_det.demo.scene_dataset import write_scenes
from moco_det.engine.explain import explain_key
from moco_det.engine.resume import FREE, LOGGED
from moco_det.engine.trackers import build_trackers
from moco_det.inference.video import read_frames, video_facts
from moco_det.modeling.detector import build_detector
from moco_det.survey.coco_file import _check_own
from pretrain.config.defaults import get_defaults, set_key
from pretrain.engine.progress import read_records
from pretrain.probe.backbone import load_backbone
from tests.conftest import NARROW, QUICK
from tools import train_net


@pytest.fixture(autouse=True)
def _no_test_hangs():
    """A reader that waits for a pipe fails at once."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(240)
    yield
    signal.alarm(0)


def test_a_part_of_itself_is_discarded_and_what_is_shared_stays_shared(tmp_path):
    tree = {"a": [1, 2], "weights": torch.ones(2)}
    tree |= {"self": tree, "again": tree["a"]}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree))
    read = read_checkpoint(tmp_path / "a.pkl")
    assert isinstance(read["self"], Discarded)
    assert read["again"] is read["a"]


def test_a_small_file_does_not_expand_into_a_large_tree(tmp_path):
    tree = ["x"]
    for _ in range(60):
        tree = [tree, tree]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": tree}))
    assert (tmp_path / "a.pkl").stat().st_size < 2_000
    with pytest.raises(CheckpointError, match="repeats the same content"):
        read_checkpoint(tmp_path / "a.pkl")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "x", ""])
def test_json_that_cannot_be_read_is_a_value_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "a.json")


def test_text_and_json_come_from_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "absent", "."):
        with pytest.raises(UserError, match=f"^cannot read {tmp_path}.*[.]$"):
            read_text(tmp_path / name)
        with pytest.raises(OSError, match=r"."):
            read_json(tmp_path / name)
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa\xff")
    assert read_text(tmp_path / "text") == "a\ufffd"


@pytest.mark.parametrize("value", ["1" + "0" * 300, "-18446744073709551616", "0x" + "f" * 20])
def test_an_integer_in_yaml_has_at_most_64_bits(value):
    with pytest.raises(LimitError, match="64 bits"):
        parse_yaml(f"a: {value}")
    assert parse_yaml("a: 18446744073709551615") == {"a": 2**64 - 1}


def test_what_cannot_be_printed_is_escaped(capsys, tmp_path):
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        before, sys.stdout = sys.stdout, file
        try:
            assert run_tool(lambda: print("a\ud800")) == 0
        finally:
            sys.stdout = before
    assert (tmp_path / "out").read_text() == "a\\ud800\n"


def test_used_up_memory_is_one_sentence(capsys):
    def work():
        bytearray(1 << 62)

    assert run_tool(work) == 1
    assert capsys.readouterr().err == f"{MEMORY}\n"


@pytest.mark.parametrize(
    "line",
    [
        "PROTOCOL: {}",
        "MODEL: {DEVICE: null}",
        "MODEL: {WEIGHTS: {a: 1}}",
        "DATASETS: {TRAIN: [{a: 1}]}",
        "DATASETS: {TEST: [7]}",
        "SOLVER: {BASE_LR: .nan}",
        "SOLVER: {BASE_LR: .inf}",
        "SOLVER: {STEPS: [a, b]}",
        "MODEL: {PIXEL_MEAN: [1, 2, .nan]}",
        "INPUT: {MIN_SIZE_TRAIN: [[800]]}",
    ],
)
def test_a_value_of_another_kind_in_a_protocols_file_is_one_sentence(tmp_path, line):
    (tmp_path / "a.yaml").write_text(line)
    with pytest.raises(UserError, match="a.yaml.*(line 1|unknown key)"):
        load_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "x", [1]])
def test_a_number_of_a_recipe_is_finite(value):
    with pytest.raises(UserError, match=r"MOCO.TEMPERATURE"):
        set_key(get_defaults(), "MOCO.TEMPERATURE", value, "a.yaml")


def test_only_numbers_of_a_runs_record_are_read(tmp_path):
    lines = [
        '{"iteration": 1, "loss": 2.5, "x": "text", "y": [1], "z": ' + "9" * 400 + "}",
        '{"iteration": "2", "loss": 1}',
        '{"loss": 1}',
        "[" * 100_000,
        '{"iteration": 3, "loss": NaN, "ok": true}',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    first, second = read_records(tmp_path / "metrics.json")
    assert first == {"iteration": 1, "loss": 2.5}
    assert second["iteration"] == 3
    assert second["loss"] != second["loss"]
    assert set(second) == {"iteration", "loss"}


@pytest.mark.parametrize(
    "broken", [{}, {"config": None}, {"config": "INPUT: 7"}, {"config": "INPUT: {CROP_SIZE: x}"}]
)
def test_a_checkpoint_of_ours_without_its_parts_is_not_probed(tmp_path, broken):
    torch.save({"format": "moco-det/pretrain/2", **broken}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="cannot be probed"):
        load_backbone(tmp_path / "a.pth")


@pytest.mark.parametrize("value", ["text", 10**400, {"a": 1}, None, Discarded("x")])
def test_what_is_no_tensor_is_not_loaded_into_a_detector(value):
    with pytest.raises(UserError, match="weight is no tensor"):
        load_detector(torch.nn.Linear(1, 1), {"weight": value}, "a.pth")


class _Malformed:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        state["missing"]  # as Detectron2 and torch would, with whatever error


def test_a_state_that_does_not_fit_a_resumed_run_is_one_sentence(tmp_path):
    model = torch.nn.Linear(1, 1)
    checkpointer = RunCheckpointer(model, str(tmp_path), trainer=_Malformed())
    checkpointer.save("model_0000000")
    with pytest.raises(UserError, match="trainer state of .* does not fit this run"):
        checkpointer.load_newest()


def test_metadata_of_converted_weights_are_of_their_kinds(weights_file, tmp_path):
    content = pickle.loads(weights_file.read_bytes())
    for value in (torch.ones(3), "50", [50], 10**400):
        for key in ("depth", "pixel_mean", "format"):
            changed = {**content, "metadata": {**content["metadata"], key: value}}
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(changed))
            try:
                weights = read_backbone(str(tmp_path / "a.pkl"))
            except UserError:
                continue
            assert "MODEL.PIXEL_MEAN" not in weights.settings


@pytest.mark.parametrize("kind", ["pipe", "device", "playlist", "concatenation", "empty"])
def test_a_video_is_a_regular_file_of_its_own(tmp_path, kind):
    path = tmp_path / "x.mp4"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "playlist":
        path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    elif kind == "concatenation":
        path.write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    else:
        path.touch()
    assert video_facts(path) == (25.0, 0)
    with pytest.raises(UserError, match=r"x.mp4"):
        next(read_frames(path))


def test_the_explanation_of_a_key_says_whether_it_may_change_on_resume():
    for key in ("SOLVER.MAX_ITER", "TEST.EVAL_PERIOD", "INPUT.MIN_SIZE_TEST"):
        assert "on --resume: can be changed; the change is logged" in explain_key(key)
    assert explain_key("DATALOADER.NUM_WORKERS").endswith("on --resume: can be changed")
    for key in ("SOLVER.WEIGHT_DECAY", "MODEL.WEIGHTS", "SEED"):
        assert explain_key(key).endswith("on --resume: cannot be changed")
    assert not set(FREE) & set(LOGGED)


def _note_rank(path):
    Path(path).write_text(str(torch.distributed.get_world_size()))


def test_one_rank_meets_nobody_wherever_its_address_leads(tmp_path, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "10.255.255.1",  # left over from another job
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    launch(_note_rank, 1, tmp_path / "ran")
    assert (tmp_path / "ran").read_text() == "1"
    assert time.monotonic() - began < 20


def test_a_bug_of_ours_is_not_reported_as_a_damaged_picture(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "_is_deep", lambda image: image.no_such_attribute)
    monkeypatch.setattr(images, "_refuse", lambda image, deep: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        images.read_picture(tmp_path / "a.png")


def test_many_categories_take_no_quadratic_time(tmp_path):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((64, 64, 3), np.uint8))
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 64}],
        "annotations": [box],
        "categories": [{"id": i, "name": f"c{i}"} for i in range(20_000)],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    began = time.process_time()
    _, classes, _ = read_coco(tmp_path / "a.json", [tmp_path], DatasetReport("a"))
    assert len(classes) == 20_000
    assert time.process_time() - began < 10


@pytest.mark.parametrize("words", [["--eval-only"], ["--resume"]])
def test_weights_at_an_address_that_a_run_directory_names_are_not_fetched(
    tmp_path, capsys, monkeypatch, words
):
    fetched = []
    monkeypatch.setattr(backbone_weights.PathManager, "get_local_path", fetched.append)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("MODEL: {WEIGHTS: 'https://127.0.0.1:9/x.pkl'}\n")
    assert train_net.main([*words, "--output-dir", str(run)]) == 1
    error = capsys.readouterr().err
    assert "pass MODEL.WEIGHTS on the command line" in error
    assert error.count("\n") == 1
    assert not fetched


def test_changed_test_data_are_named_when_a_run_is_resumed(tmp_path, voc_dir, capsys):
    data = shutil.copytree(voc_dir, tmp_path / "data")
    words = ["--train-data", f"voc:{data}:trainval", "--test-data", f"voc:{data}:test"]
    words += ["--output-dir", str(tmp_path / "run"), *NARROW, *QUICK]
    words += ["TEST.PRECISE_BN.ENABLED", "False", "TEST.EVAL_PERIOD", "0"]
    assert train_net.main(["--config", "VOC-random", *words, "SOLVER.MAX_ITER", "1"]) == 0
    again = ["--config", "VOC-random", *words, "SOLVER.MAX_ITER", "2", "--resume"]
    (data / "ImageSets/Main/test.txt").write_text("000004\n")
    capsys.readouterr()
    assert train_net.main(again) == 0
    said = "".join(capsys.readouterr())
    assert "the test data changed since the run started: 1 images instead of 2" in said
    assert "the training data changed" not in said


@pytest.mark.parametrize("content", ["[" * 100_000, "x", "[1]", "9" * 10_000])
def test_a_damaged_file_of_a_run_is_one_sentence(tmp_path, content):
    for name, read in (
        ("results.json", lambda: api._results(tmp_path)),
        ("trackers.json", lambda: build_trackers([], tmp_path, {}, 1)),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"^[^\n]*{name}[^\n]*[.]$"):
            read()


@pytest.mark.parametrize("content", ["[" * 100_000, "x", "[1]", "9" * 10_000, '{"info": 1}'])
def test_a_damaged_annotation_file_is_not_replaced(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="was not written by this tool and is not replaced"):
        _check_own(tmp_path / "a.json")


@pytest.mark.parametrize("content", ["[" * 100_000, "x"])
def test_a_damaged_record_of_the_demos_scenes_is_one_sentence(tmp_path, content):
    (tmp_path / "scenes.json").write_text(content)
    with pytest.raises(UserError, match="scenes.json.*choose another --output-dir"):
        next(write_scenes(tmp_path))


SETTING_UP = """
import sys, time
sys.path[0] = {root!r}
import {module} as work
from tools import {tool}

def waits(*_):
    print("setting up", flush=True)
    time.sleep(60)

work.{step} = waits
sys.exit({tool}.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("tool", "module", "step", "words"),
    [
        ("pretrain", "pretrain.engine.train_loop", "open_source", "--config moco-v2 --data ."),
        ("train_net", "moco_det.engine.train_net", "prepare", "--config VOC-random"),
    ],
)
def test_a_run_that_is_setting_up_obeys_a_signal_in_one_line(
    tmp_path, number, tool, module, step, words
):
    root = str(Path(__file__).parents[2])
    (tmp_path / "run.py").write_text(
        SETTING_UP.format(root=root, tool=tool, module=module, step=step)
    )
    run = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", *words.split(), "--output-dir", tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stdout.readline() == "setting up\n"
        run.send_signal(number)
        time.sleep(0.02)
        run.send_signal(number)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 128 + number, errors
    assert errors.startswith("stopped: ")
    assert errors.count("\n") == 1


def test_a_long_list_of_bases_is_one_sentence(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: [" + "VOC, " * 20_000 + "VOC]\n")
    with pytest.raises(UserError, match="_BASE_ lists 20001, but at most 100"):
        load_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("depth", [-1, 0, 51])
def test_a_depth_that_no_resnet_has_is_one_sentence(depth):
    cfg = load_config("VOC", ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.DEVICE", "cpu"])
    with pytest.raises(UserError, match=f"DEPTH is {depth}: choose one of 18, 34, 50, 101, 152"):
        build_detector(cfg)


def test_a_link_into_proc_is_not_written_and_is_one_sentence(tmp_path):
    (tmp_path / "results.json").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"^/proc/\d+/mem cannot be written.*[.]$"):
        replace_text(tmp_path / "results.json", "{}")

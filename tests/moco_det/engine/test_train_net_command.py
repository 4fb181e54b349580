"""The command line end to end, on tiny data, in the protocols' own code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import CLASSES, NARROW, QUICK
from tests.moco_det.inference.test_predictor import make_run
from tools.train_net import main

ROOT = Path(__file__).parents[3]


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]


def losses(run):
    return [line["total_loss"] for line in lines_of(run) if "total_loss" in line]


@pytest.fixture
def voc_args(voc_dir):
    return ["--train-data", f"voc:{voc_dir}:trainval", "--test-data", f"voc:{voc_dir}:test"]


def test_faster_rcnn_c4_on_a_voc_folder(voc_args, weights_file, tmp_path, capsys):
    run = tmp_path / "moco"
    args = ["--config", "VOC", *voc_args, "--output-dir", str(run)]
    assert main([*args, "MODEL.WEIGHTS", str(weights_file), *QUICK]) == 0
    said = capsys.readouterr().out
    for expected in (
        "taken      MODEL.RESNETS.STEM_OUT_CHANNELS 4",
        "scaled     SOLVER.BASE_LR 0.02 -> 0.0025",
        "norms      naiveSyncBN -> BN (one process)",
        f"loaded     {weights_file}: all 318 backbone tensors",
        "roi_heads.res5.norm (5)",
        "iter 1/2",
        "iter 2/2",
        "bbox       AP ",
    ):
        assert expected in said

    results = json.loads((run / "results.json").read_text())
    assert results["protocol"] == "VOC"
    assert results["init"] == "moco"
    assert results["weights"] == str(weights_file)
    assert results["iteration"] == 2
    assert results["seed"] == 1
    assert results["dataset"].startswith("voc:")
    assert {"AP", "AP50", "AP75", "per_class"} <= results["bbox"].keys()
    assert set(results["bbox"]["per_class"]) == set(CLASSES)
    assert "SOLVER.IMS_PER_BATCH 16 -> 2" in results["deviations"]
    assert isinstance(json.loads((run / "inference/coco_instances_results.json").read_text()), list)

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["DATASETS"]["CLASSES"] == list(CLASSES)
    assert config["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 2
    assert config["MODEL"]["RESNETS"]["NORM"] == "naiveSyncBN"
    assert [line["iteration"] for line in lines_of(run)][:2] == [0, 1]
    assert list(run.glob("events.out.tfevents.*"))
    assert "bbox       AP " in (run / "log.txt").read_text()
    state = torch.load(run / "model_final.pth", weights_only=True)
    assert state["iteration"] == 1

    # The run directory is self-contained: evaluation needs nothing but it.
    before = results["bbox"]
    (run / "results.json").unlink()
    assert main(["--eval-only", "--output-dir", str(run)]) == 0
    assert json.loads((run / "results.json").read_text())["bbox"] == before

    # It is not overwritten, and the refusal changes nothing.
    capsys.readouterr()
    assert main([*args, "MODEL.WEIGHTS", str(weights_file), *QUICK]) == 1
    assert "already holds a finished run" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["COCO-C4-1x", "COCO-FPN-1x"])
def test_mask_rcnn_on_a_coco_file(protocol, coco_spec, weights_file, tmp_path, capsys):
    run = tmp_path / "random"
    args = ["--config", f"{protocol}-random", "--train-data", coco_spec, "--test-data", coco_spec]
    args += ["--output-dir", str(run), "MODEL.ARCHITECTURE_FROM", str(weights_file), *QUICK]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "(architecture only)" in said
    assert "masks      on, polygon" in said
    assert "mask 0." in said
    assert "Average Precision" not in said  # pycocotools' tables go to log.txt
    results = json.loads((run / "results.json").read_text())
    assert (results["protocol"], results["init"], results["weights"]) == (protocol, "random", "")
    for task in ("bbox", "segm"):
        assert {"AP", "AP50", "AP75"} <= results[task].keys()


def test_boxes_only_turn_the_mask_head_off(voc_args, tmp_path, capsys):
    args = ["--config", "COCO-C4-1x-random", *voc_args, "--output-dir", str(tmp_path / "run")]
    assert main([*args, *NARROW, *QUICK, "SOLVER.MAX_ITER", "1"]) == 0
    assert "masks      off: the training data have boxes only" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["MODEL"]["MASK_ON"] is False


def test_evaluation_on_other_data_keeps_the_runs_classes(voc_dir, voc_args, tmp_path, capsys):
    """A test set that holds the second class only must not become a one-class problem."""
    run, other = tmp_path / "run", tmp_path / "other"
    args = ["--config", "VOC-random", *voc_args, "--output-dir", str(run), *NARROW, *QUICK]
    assert main([*args, "SOLVER.MAX_ITER", "1"]) == 0
    shutil.copytree(voc_dir, other)
    for file in (other / "Annotations").iterdir():
        if "bolt" in file.read_text():
            file.unlink()
    (other / "ImageSets/Main/test.txt").write_text("000001\n000003\n")
    capsys.readouterr()
    own = {file: file.read_bytes() for file in (run / "results.json", *run.glob("inference/*"))}
    assert len(own) == 3
    evaluation = ["--eval-only", "--output-dir", str(run), "--test-data", f"voc:{other}:test"]
    assert main(evaluation) == 0
    assert "2 objects, 2 classes (bolt, nut)" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in own} == own
    (folder,) = run.glob("test-*")
    results = json.loads((folder / "results.json").read_text())
    assert results["dataset"] == f"voc:{other}:test"
    assert {p.name for p in folder.glob("inference/*")} == {p.name for p in run.glob("inference/*")}
    assert main(evaluation) == 0  # again, to the same folder
    assert list(run.glob("test-*")) == [folder]
    assert main(["--eval-only", "--output-dir", str(run)]) == 0  # its own
    assert len(list(run.glob("*/results.json"))) == 1
    assert set(results["bbox"]["per_class"]) == {"bolt", "nut"}
    assert results["bbox"]["per_class"]["bolt"] is None  # no such object: not measured


def test_masks_are_evaluated_on_images_two_pixels_wide(tmp_path):
    run = tmp_path / "run"
    make_run(run, "COCO-C4-1x", **{"INPUT.MAX_SIZE_TEST": 128})
    names = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": [], "annotations": [], "categories": names}
    for number, (width, height) in enumerate([(2, 40), (40, 2), (2, 2)], start=1):
        Image.new("L", (width, height)).save(tmp_path / f"{number}.png")
        image = {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        outline = [0, 0, width, 0, width, height, 0, height]
        content["images"].append(image)
        content["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0,
             "bbox": [0, 0, width, height], "area": width * height, "segmentation": [outline]}
        )  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    test_data = ["--test-data", f"coco:{tmp_path}/a.json:{tmp_path}"]
    assert main(["--eval-only", "--output-dir", str(run), *test_data]) == 0
    (results,) = run.rglob("results.json")
    assert 0 <= json.loads(results.read_text())["segm"]["AP"] <= 100


def test_the_same_seed_gives_the_same_run_and_trials_differ(voc_args, tmp_path):
    args = ["--config", "VOC-random", *voc_args, *NARROW, *QUICK, "SOLVER.MAX_ITER", "3"]
    assert main([*args, "--output-dir", str(tmp_path / "a"), "SEED", "5"]) == 0
    assert main([*args, "--output-dir", str(tmp_path / "b"), "--trials", "2", "SEED", "5"]) == 0
    alone, first, second = (losses(tmp_path / run) for run in ("a", "b/trial_0", "b/trial_1"))
    assert alone == first
    assert first != second
    a, b = (
        torch.load(tmp_path / run / "model_final.pth", weights_only=True)["model"]
        for run in ("a", "b/trial_0")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    seeds = [json.loads(p.read_text())["seed"] for p in sorted(tmp_path.glob("b/*/results.json"))]
    assert seeds == [5, 6]


def test_one_trial_alone_is_that_trial_of_all(voc_args, tmp_path, capsys):
    """As a cluster runs them; oracle: the same trial among all trials."""
    args = ["--config", "VOC-random", *voc_args, *NARROW, *QUICK, "SOLVER.MAX_ITER", "1"]
    assert main([*args, "--output-dir", str(tmp_path / "all"), "--trials", "2", "SEED", "5"]) == 0
    assert main([*args, "--output-dir", str(tmp_path / "one"), "--trial", "1", "SEED", "5"]) == 0
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["trial_1"]
    assert losses(tmp_path / "one/trial_1") == losses(tmp_path / "all/trial_1")
    results = json.loads((tmp_path / "one/trial_1/results.json").read_text())
    assert results["seed"] == 6
    # Its own config holds its seed: going on with it adds nothing.
    capsys.readouterr()
    assert main(["--eval-only", "--output-dir", str(tmp_path / "one"), "--trial", "1"]) == 0
    assert json.loads((tmp_path / "one/trial_1/results.json").read_text())["seed"] == 6


def test_strict_refuses_what_is_otherwise_mended(voc_dir, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(voc_dir, other)
    file = other / "Annotations/000000.xml"
    file.write_text(file.read_text().replace("<xmax>50</xmax>", "<xmax>500</xmax>"))
    args = ["--config", "VOC-random", "--train-data", f"voc:{other}:trainval", "--explain"]
    assert main(args) == 0
    assert "1 x box partly outside the image: clipped" in capsys.readouterr().out
    assert main([*args, "--strict"]) == 1
    error = capsys.readouterr().err
    assert "1 fault in" in error
    assert "000000.xml" in error
    run = tmp_path / "run"
    args = ["--config", "VOC-random", "--train-data", f"voc:{other}:trainval"]
    assert main([*args, "--output-dir", str(run), *NARROW, *QUICK]) == 0
    (trained_on,) = json.loads((run / "findings.json").read_text())["datasets"]
    (finding,) = trained_on["findings"]
    assert finding["file"].endswith("000000.xml")


def test_resume_goes_on_where_the_run_stopped(voc_args, tmp_path, capsys):
    """Oracle: iterations, learning rates and momentum of a run that was never interrupted."""
    schedule = [
        "SOLVER.WARMUP_ITERS",
        "0",
        "SOLVER.STEPS",
        "(3,)",
        "TEST.PRECISE_BN.ENABLED",
        "False",
    ]
    common = ["--config", "VOC-random", *voc_args, *NARROW, *QUICK, *schedule]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*common, "--output-dir", str(whole), "SOLVER.MAX_ITER", "4"]) == 0
    cut = ["SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"]
    assert main([*common, "--output-dir", str(parts), *cut]) == 0
    (parts / "last_checkpoint").write_text("model_0000001.pth")  # as if stopped after two
    (parts / "metrics.json").write_text(
        "\n".join((parts / "metrics.json").read_text().splitlines()[:2]) + "\n"
    )
    capsys.readouterr()
    assert main(["--resume", "--output-dir", str(parts)]) == 0
    assert "resumed    at iteration 2 of 4" in capsys.readouterr().out
    for key in ("iteration", "lr"):
        found = [line[key] for line in lines_of(parts) if key in line and "total_loss" in line]
        assert found == [
            line[key] for line in lines_of(whole) if key in line and "total_loss" in line
        ]
    final = torch.load(parts / "model_final.pth", weights_only=True)
    assert final["trainer"]["_trainer"]["optimizer"]["state"]
    assert final["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == 4


def test_two_processes_on_the_cpu_train_and_evaluate(voc_args, tmp_path):
    args = ["--config", "COCO-FPN-1x-random", *voc_args, "--num-gpus", "2", *NARROW, *QUICK]
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "tools/train_net.py", *args, "--output-dir", str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "SyncBN replaced by an equivalent" in done.stdout
    assert done.stdout.count("iter 2/2") == 1
    assert (run / "results.json").is_file()
    assert (run / "log.txt.rank1").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "VOC"], "VOC starts from pre-trained weights: add MODEL.WEIGHTS FILE"),
        (
            ["--config", "VOC-random", "MODEL.WEIGHTS", "x.pkl"],
            "VOC-random starts from random weights",
        ),
        (["--config", "VOC", "MODEL.WEIGHTS", "none.pkl"], "the weights file none.pkl does not"),
        (["--config", "VO"], "no protocol is called 'VO'"),
        ([], "name a protocol or a file with --config"),
        (["--eval-only", "--output-dir", "none"], "none/config.yaml is missing"),
        (["--config", "VOC-random", "--train-data", "voc:none:trainval"], "none"),
        (["--config", "VOC-random", "SOLVER.MAX_ITR", "1"], "unknown key 'SOLVER.MAX_ITR'"),
        (["--config", "VOC-random", "MODEL.ROI_HEADS.NUM_CLASSES", "9"], "the data have 2 classes"),
        (
            ["--config", "COCO-C4-1x-random", "MODEL.MASK_ON", "True"],
            "the training data have no masks",
        ),
        (["--config", "VOC-random", "--num-gpus", "3"], "16 cannot be shared by 3 processes"),
        (
            ["--config", "VOC-random", "MODEL.BACKBONE.FREEZE_AT", "2"],
            "MODEL.BACKBONE.FREEZE_AT is 2, but the run starts from random weights",
        ),
        (["--config", "VOC-random", "--trials", "0"], "--trials must be at least 1"),
        (["--config", "VOC-random", "--trials", "2", "--trial", "0"], "pass one of the two"),
        (["--config", "VOC-random", "--trial", "-1"], "--trial must be at least 0, not -1"),
        (["--config", "VOC-semseg-random"], "is not a data set of pixel labels"),
        (["--config", "COCO-keypoints-2x-random"], "the training data have no keypoints"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(args, message, voc_args, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--train-data" not in args and "--eval-only" not in args:
        args = [*args, *voc_args]
    extra = [] if "--eval-only" in args else ["--output-dir", "run", "MODEL.DEVICE", "cpu"]
    if "FREEZE_AT" in str(args):
        extra += [*NARROW, *QUICK]
    assert main([*args, *extra]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_detectron2s_data_sets_that_are_not_there_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", "VOC-random", "MODEL.DEVICE", "cpu"]) == 1
    assert "voc_2007_trainval is not on this machine" in capsys.readouterr().err


def test_key_value_pairs_may_follow_the_training_data(voc_dir, tmp_path, capsys):
    args = ["--config", "VOC-random", "--output-dir", str(tmp_path / "r"), "--train-data"]
    assert main([*args, f"voc:{voc_dir}:trainval", "SOLVER.MAX_ITR", "1"]) == 1
    assert "unknown key 'SOLVER.MAX_ITR'" in capsys.readouterr().err

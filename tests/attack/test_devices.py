"""A device or pipe named as the output stays what it is, and the answer is one sentence."""

import os
import stat
from pathlib import Path

import pytest

from tests.conftest import NARROW, QUICK
from tests.moco_det.inference.test_predictor import make_run
from tests.pretrain.probe_data import tiny_backbone, write_classes
from tests.pretrain.runs import TINY, write_photographs
from tools import (
    convert,
    data,
    demo,
    export,
    inspect_run,
    predict,
    pretrain,
    probe,
    report,
    train_net,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    import torch

    room = tmp_path_factory.mktemp("inputs")
    write_photographs(room / "photographs")
    write_classes(room / "classes", 2)
    torch.save(tiny_backbone().state_dict(), room / "backbone.pth")
    (room / "run").mkdir()
    (room / "run" / "results.json").write_text('{"protocol": "VOC", "dataset": "x", "bbox": {}}')
    make_run(room / "detector", "VOC")
    (room / "own").mkdir()
    (room / "own" / "config.yaml").write_text("METHOD: moco\n")
    return room


def calls(inputs, voc_dir, output):
    """Each tool with ``output`` where its results would go."""
    photographs = ["--config", "moco-v2", "--data", inputs / "photographs", *TINY]
    small = ["--crop-size", "32", "--workers", "1", "-k", "1"]
    detect = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval", *NARROW, *QUICK]
    boxes, detector = f"voc:{voc_dir}:trainval", inputs / "detector"
    probed = [inputs / "backbone.pth", "--train", inputs / "classes", *small, "--no-cache"]
    return {
        "convert": (convert.main, [inputs / "backbone.pth", "-o", output]),
        "views": (pretrain.main, [*photographs, "--show-views", output]),
        "pretrain": (pretrain.main, [*photographs, "--output-dir", output]),
        "train": (train_net.main, [*detect, "--output-dir", output]),
        "probe": (probe.main, [*probed, "-o", output]),
        "inspect": (inspect_run.main, [inputs / "own", "--no-images", "-o", output]),
        "report": (report.main, [inputs / "run", "-o", output]),
        "predict": (predict.main, [inputs / "photographs", "--run", detector, "-o", output]),
        "export": (export.main, ["--run", detector, "-o", output]),
        "sheet": (data.main, [boxes, "--sheet", output]),
        "to-coco": (data.main, [boxes, "--to-coco", output]),
        "demo": (demo.main, ["-o", output]),
    }


TOOLS = (
    *("convert", "views", "pretrain", "train", "probe", "inspect", "report", "predict", "export"),
    *("sheet", "to-coco", "demo"),
)
ENDINGS = {"export": ".onnx", "sheet": ".jpg", "to-coco": ".json"}  # which these tools require


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", ["null", "full", "pipe"])
def test_no_device_or_pipe_is_replaced(inputs, voc_dir, tmp_path, capsys, tool, kind):
    device, target = Path(f"/dev/{kind}"), tmp_path / f"output{ENDINGS.get(tool, '')}"
    if kind == "pipe":
        os.mkfifo(target)
    elif tool in ENDINGS:
        target.symlink_to(device)
    else:
        target = device
    before = os.stat(target)
    function, words = calls(inputs, voc_dir, target)[tool]
    assert function([str(word) for word in words]) == 1
    after = os.stat(target)
    assert (after.st_ino, stat.S_IFMT(after.st_mode)) == (
        before.st_ino,
        stat.S_IFMT(before.st_mode),
    )
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(target) in errors[0] or str(target.resolve()) in errors[0]

"""The Python interface: the page's program runs, and the functions do what the commands do."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Instances

import moco_det
import pretrain
from moco_common.errors import UserError
from moco_det.inference.predictor import predictor_of_run
from tests.conftest import QUICK
from tests.moco_det.inference.test_predictor import make_run
from tests.pretrain.runs import TINY, write_photographs
from tools.train_net import main as train_net

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def as_settings(words):
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.timeout(900)
def test_the_program_of_the_page_runs(tmp_path, monkeypatch, voc_dir, capsys):
    """With a tiny network and a few steps; the rest as printed."""
    pytest.importorskip("onnxruntime", reason="pip install 'moco-det[export]'")
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    tiny = as_settings(TINY) | {"MODEL.DEPTH": 50, "MOCO.QUEUE_SIZE": 8, "SOLVER.MAX_ITER": 2}
    for old, new in (
        ('{"SOLVER.MAX_ITER": 1500}', repr(tiny)),
        (
            '{"MODEL.WEIGHTS": "moco.pkl"}',
            repr({**as_settings(QUICK), "MODEL.WEIGHTS": "moco.pkl"}),
        ),
        ("threshold=0.3", "threshold=0.0"),
    ):
        assert old in program
        program = program.replace(old, new)
    write_photographs(tmp_path / "photos")
    (tmp_path / "boxes").symlink_to(voc_dir)
    (tmp_path / "photo.jpg").symlink_to(voc_dir / "JPEGImages" / "000000.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/api.md", "exec"), {})
    assert re.search(r"^(bolt|nut) 0\.\d+ \[", capsys.readouterr().out, flags=re.MULTILINE)
    assert (tmp_path / "detector.onnx").is_file()


def test_train_writes_the_weights_of_the_command_line(tmp_path, voc_dir, weights_file, capsys):
    data = [f"voc:{voc_dir}:trainval", f"voc:{voc_dir}:test"]
    settings = {**as_settings(QUICK), "MODEL.WEIGHTS": weights_file, "SOLVER.BASE_LR": 1e-3}
    ours = {"train_data": data[0], "test_data": data[1], "settings": settings}
    results = moco_det.train("VOC", output_dir=tmp_path / "a", quiet=True, **ours)
    assert capsys.readouterr().out == ""
    words = ["--train-data", data[0], "--test-data", data[1], "--output-dir", str(tmp_path / "b")]
    overrides = [str(word) for pair in settings.items() for word in pair]
    assert train_net(["--config", "VOC", *words, *overrides]) == 0
    first, second = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=False)["model"]
        for name in "ab"
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    recorded = json.loads((tmp_path / "b" / "results.json").read_text())
    assert results["bbox"] == recorded["bbox"]
    # Another test set has a folder of its own.
    other = moco_det.evaluate(tmp_path / "a", test_data=data[0], quiet=True)
    assert other["dataset"] == data[0]
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == results


def test_predictor_returns_what_the_detector_finds(tmp_path):
    make_run(tmp_path / "run", "COCO-C4-1x")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), pixels[:, :, ::-1])
    predict = moco_det.Predictor(tmp_path / "run", threshold=0.0)
    found, expected = predict(pixels), predictor_of_run(tmp_path / "run", 0.0)(pixels)
    assert isinstance(found, Instances)
    assert len(found) == len(expected) > 0
    assert np.array_equal(found.pred_boxes.tensor.numpy(), expected.boxes)
    assert np.array_equal(found.pred_masks.numpy(), expected.masks)
    assert predict.class_names == ["cat", "dog"]
    by_name = predict(tmp_path / "photo.png")
    assert torch.equal(by_name.scores, found.scores)
    for wrong in (pixels[:, :, 0], pixels / 255):
        with pytest.raises(UserError, match="array \\(H, W, 3\\) of uint8"):
            predict(wrong)


def test_mistakes_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="SOLVER.MAX_ITER"):
        moco_det.train("VOC", output_dir=tmp_path / "a", settings={"SOLVER.MAX_ITR": 1})
    with pytest.raises(UserError, match="absent does not exist"):
        pretrain.train("moco-v2", data=tmp_path / "absent", output_dir=tmp_path / "b")
    with pytest.raises(UserError, match="data is empty"):
        pretrain.train("moco-v2", data=[], output_dir=tmp_path / "b")
    make_run(tmp_path / "labels", "VOC-semseg", **{"MODEL.SEM_SEG_HEAD.CONVS_DIM": 8})
    with pytest.raises(UserError, match="labels pixels"):
        moco_det.Predictor(tmp_path / "labels")
    assert not {"a", "b"} & {path.name for path in tmp_path.iterdir()}


def test_importing_the_packages_imports_neither_torch_nor_detectron2():
    code = (
        "import sys, moco_det, pretrain; "
        "print(sorted({'torch', 'detectron2', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_function_of_the_page_is_exported_and_typed():
    names = re.findall(r"^\| `(pretrain|moco_det)\.(\w+)`", PAGE, flags=re.MULTILINE)
    assert len(names) == 6
    for package, name in names:
        module = {"pretrain": pretrain, "moco_det": moco_det}[package]
        assert name in module.__all__
        assert name in dir(module)
        signature = inspect.signature(getattr(module, name))
        assert all(p.annotation is not p.empty for p in signature.parameters.values())
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        pretrain.absent  # noqa: B018

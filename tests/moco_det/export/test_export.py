"""Exported detectors find what the detector finds, in every format, without Detectron2."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from moco_det.export.comparison import Agreement
from moco_det.export.export_run import example_images
from moco_det.export.graph import Exported
from moco_det.inference.predictor import Detector, load_image, predictor_of_run
from moco_det.structures.objects import Objects
from tests.moco_det.inference.test_predictor import make_run
from tools.export import main

pytest.importorskip("onnx", reason="pip install 'moco-det[export]'")
onnxruntime = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
PROTOCOLS = ("VOC", "VOC-DC5", "COCO-C4-1x", "COCO-FPN-1x")
NARROWER = {
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.DC5_CHANNELS": 32,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A wide image, a tall one that the limit of the longer side shrinks, and one of full size."""
    files = []
    for seed, size in enumerate(((70, 90), (130, 60), (64, 64))):
        pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        files.append(tmp_path_factory.getbasetemp() / f"photo{seed}.png")
        cv2.imwrite(str(files[-1]), cv2.resize(pixels, size[::-1]))
    return files


@pytest.fixture(scope="module", params=PROTOCOLS)
def run(request, tmp_path_factory, photos):
    """A run with its two exports, and what was printed. Its scores are spread out and those of the
    background are low: random weights find little, with nearly equal scores."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    _, model = make_run(folder, request.param, **NARROWER, **{"INPUT.MAX_SIZE_TEST": 100})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "box_predictor" in name or "mask_head.predictor" in name:
                weight.mul_(20)
        model.roi_heads.box_predictor.cls_score.bias[-1] = -5
    torch.save({"model": model.state_dict(), "iteration": 1}, folder / "model_final.pth")
    for name in ("detector.onnx", "detector.pt"):
        export(folder, photos[:1], folder / name)
    return folder


def export(run, photos, output, *more):
    assert main(["--run", str(run), "-o", str(output), *map(str, photos), *more]) == 0


def assert_equal(found, expected):
    """The promise of the page, on objects in the same order."""
    assert len(found) == len(expected) > 0
    assert found.classes.tolist() == expected.classes.tolist()
    assert found.boxes == pytest.approx(expected.boxes, abs=0.1)
    assert found.scores == pytest.approx(expected.scores, abs=1e-3)
    if expected.masks is not None:
        both = (found.masks & expected.masks).sum((1, 2))
        either = (found.masks | expected.masks).sum((1, 2))
        assert (both > 0.99 * either).all() or (either - both).max() <= 1


def test_onnx_finds_what_the_detector_finds_in_images_of_any_size(run, photos):
    session = onnxruntime.InferenceSession(str(run / "detector.onnx"))
    detector = predictor_of_run(run, 0.05)
    graph = Exported(
        lambda image: [torch.from_numpy(a) for a in session.run(None, {"image": image.numpy()})]
    )
    exported = Detector(graph, detector.class_names, "RGB", 64, 100, 0.05)
    for photo in photos:
        assert_equal(exported(load_image(photo)), detector(load_image(photo)))


def test_torchscript_runs_where_detectron2_cannot_be_imported(run, photos, tmp_path):
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "import json, torch, torchvision, numpy\n"
        "extra = {'moco_det.json': ''}\n"
        "model = torch.jit.load(sys.argv[1], _extra_files=extra)\n"
        "image = torch.from_numpy(numpy.load(sys.argv[2]))\n"
        "outputs = [output.tolist() for output in model(image)]\n"
        "print(json.dumps([json.loads(extra['moco_det.json']), outputs]))"
    )
    image = load_image(photos[2])  # 64 x 64: nothing is resized
    np.save(tmp_path / "image.npy", image.transpose(2, 0, 1).astype("float32"))
    words = [sys.executable, "-W", "ignore", "-c", code, run / "detector.pt"]
    done = subprocess.run([*words, tmp_path / "image.npy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    settings, outputs = json.loads(done.stdout)
    detector = predictor_of_run(run, 0.05)
    expected = detector(image)
    assert settings["class_names"] == detector.class_names
    assert np.array(outputs[0]) == pytest.approx(expected.boxes, abs=1e-3)
    assert outputs[1] == pytest.approx(expected.scores.tolist(), abs=1e-5)
    assert len(outputs) == (3 if expected.masks is None else 4)


def test_the_program_of_the_page_finds_the_same_without_detectron2(run, photos, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len([line for line in program.splitlines() if line.strip()]) <= 32
    for package in ("detectron2", "torch", "moco_det"):
        program = f"import sys; sys.modules['{package}'] = None\n{program}"
    detector = predictor_of_run(run, 0.05)
    for photo in photos:
        words = [sys.executable, "-c", program, run / "detector.onnx", photo]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        expected = detector(load_image(photo))
        lines = [line.split() for line in done.stdout.splitlines()]
        assert len(lines) == len(expected) > 0
        for index, (name, score, *numbers) in enumerate(lines):
            assert name == detector.class_names[expected.classes[index]]
            assert float(score) == pytest.approx(expected.scores[index], abs=1e-3)
            box = list(map(float, numbers[:4]))
            assert box == pytest.approx(expected.boxes[index].tolist(), abs=0.1)
            if expected.masks is not None:
                area = int(expected.masks[index].sum())
                assert int(numbers[4]) == pytest.approx(area, abs=max(1, 0.01 * area))


@pytest.fixture(scope="module")
def box_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "voc"
    make_run(folder, "VOC")
    return folder


def test_the_command_reports_agreement_and_time(box_run, photos, tmp_path, capsys):
    export(box_run, photos[:2], tmp_path / "d.onnx", "--threshold", "0")
    printed = capsys.readouterr().out
    assert re.search(r"verified   [1-9]\d* objects in 2 images: boxes within", printed)
    assert re.search(r"time       \d.*the detector \d", printed)


def test_the_file_describes_itself(box_run, photos, tmp_path):
    export(box_run, photos[:1], tmp_path / "d.onnx", "--threshold", "0.25", "--quiet")
    session = onnxruntime.InferenceSession(str(tmp_path / "d.onnx"))
    settings = json.loads(session.get_modelmeta().custom_metadata_map["moco_det"])
    assert settings["class_names"] == ["cat", "dog"]
    assert (settings["short_side"], settings["long_side"]) == (64, 1333)
    assert settings["image_format"] == "RGB"
    assert settings["pixel_mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert (settings["score_threshold"], settings["mask_threshold"]) == (0.25, 0.5)
    assert [output.name for output in session.get_outputs()] == settings["outputs"]
    for key in settings:
        assert f"`{key}`" in PAGE, key


def test_a_graph_that_differs_is_not_written(box_run, photos, tmp_path, monkeypatch, capsys):
    """With the scores of the exported graph a hundredth lower than the detector's."""
    forward = Exported.forward

    def lower(self, inputs):
        found = forward(self, inputs)
        found[0]["instances"].scores -= 0.01
        return found

    monkeypatch.setattr(Exported, "forward", lower)
    words = ["--run", str(box_run), "-o", str(tmp_path / "d.pt"), str(photos[0])]
    assert main([*words, "--threshold", "0"]) == 1
    assert "differs from the detector in" in capsys.readouterr().err
    assert not list(tmp_path.glob("*d.pt*"))


def objects(scores, shift=0.0, grow=0):
    boxes = np.array([[0, 0, 20, 20], [5, 5, 25, 25], [30, 30, 40, 40]], float) + shift
    masks = np.zeros((3, 40, 40), bool)
    masks[:, : 20 + grow, :20] = True
    return Objects(boxes, np.array([0, 0, 1]), np.array(scores, float), masks)


@pytest.mark.parametrize(
    ("found", "faults"),
    [
        (objects((0.9, 0.8, 0.3), shift=0.09), 0),
        (objects((0.9, 0.8, 0.3), shift=0.11), 6),  # three missing, three more
        (objects((0.9, 0.8008, 0.3)), 0),
        (objects((0.9, 0.802, 0.3)), 1),
        (objects((0.9, 0.8, 0.3), grow=1), 3),
        (objects((0.9, 0.8, 0.3)).select(np.array([1, 2, 0])), 0),  # in another order
        (objects((0.9, 0.8, 0.3)).select(np.array([0, 1])), 1),
    ],
)
def test_agreement_holds_within_the_promised_tolerances(found, faults):
    agreement = Agreement()
    agreement.add(objects((0.9, 0.8, 0.3)), found, floor=0.05, most=100, image="x")
    assert len(agreement.faults or ()) == faults


def test_objects_that_rounding_may_drop_are_not_required():
    two = np.array([0, 1])
    for floor, most in ((0.2995, 100), (0.05, 3)):  # at the threshold; the last of a full image
        for pair in ((objects((0.9, 0.8, 0.3)), objects((0.9, 0.8, 0.3)).select(two)),) * 2:
            for expected, found in (pair, pair[::-1]):
                agreement = Agreement()
                agreement.add(expected, found, floor=floor, most=most, image="x")
                assert not agreement.faults


def test_other_models_are_refused_in_one_sentence(tmp_path, capsys):
    changes = {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2, "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8}
    make_run(tmp_path / "labels", "VOC-semseg", **changes)
    make_run(tmp_path / "keypoints", "COCO-keypoints-2x", **NARROWER)
    for name, reason in (("labels", "not a run of a detector"), ("keypoints", "keypoints")):
        assert main(["--run", str(tmp_path / name), "-o", str(tmp_path / "out.pt")]) == 1
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


def test_the_example_images_are_wide_tall_and_square():
    shapes = [image.shape for image in example_images().values()]
    assert shapes == [(320, 480, 3), (480, 320, 3), (400, 400, 3)]
    assert all(Image.fromarray(image) for image in example_images().values())

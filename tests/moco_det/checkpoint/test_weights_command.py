"""What the tools take from the weights given to them, what they refuse, what they never run."""

import pickle
import struct

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from moco_det.checkpoint.backbone_weights import read_backbone
from moco_det.checkpoint.detector_weights import load_weights
from moco_det.config.protocols import load_config
from moco_det.conversion import convert
from moco_det.engine.setup import Options, prepare
from moco_det.modeling.detector import build_detector
from tests.conftest import NARROW, QUICK, narrow_backbone
from tests.moco_det.convert_cases import state_dict
from tools.predict import main as predict
from tools.train_net import main as train_net


@pytest.fixture
def voc(voc_dir):
    return f"voc:{voc_dir}:trainval", f"voc:{voc_dir}:test"


@pytest.fixture
def settle(voc, tmp_path):
    """What the command line resolves to, and what it prints of it, before anything is trained."""

    def plan(weights, *overrides, config="VOC"):
        overrides = ["MODEL.WEIGHTS", str(weights), *QUICK, *overrides]
        prepared = prepare(Options(config, voc[:1], voc[1], 1, False, False, None,
                                   str(tmp_path / "run"), overrides))  # fmt: skip
        return prepared.cfg, "\n".join(prepared.notes)

    return plan


@pytest.fixture
def rewritten(weights_file, tmp_path):
    """The narrow backbone's file with other metadata; without any if there is no change."""

    def write(**changes):
        content = pickle.loads(weights_file.read_bytes())
        metadata = content.pop("metadata")
        if changes:
            content["metadata"] = metadata | changes
        path = tmp_path / "weights.pkl"
        path.write_bytes(pickle.dumps(content))
        return path

    return write


SETTINGS = {  # key of the metadata: its value, the config's key and its value in the protocol
    "pixel_mean": ([1.0, 2.0, 3.0], "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"),
    "pixel_std": ([4.0, 5.0, 6.0], "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"),
    "format": ("BGR", "INPUT.FORMAT", "RGB"),
    "stride_in_1x1": (True, "MODEL.RESNETS.STRIDE_IN_1X1", "False"),
}


def value_of(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("name", SETTINGS)
def test_the_config_takes_what_the_metadata_say_and_says_so(settle, rewritten, name):
    value, key, _ = SETTINGS[name]
    cfg, said = settle(rewritten(**{name: value}))
    assert value_of(cfg, key) == value
    assert f"{key} {value}" in said


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_the_config_takes_depth_and_statistics_from_what_convert_writes(settle, tmp_path, suffix):
    torch.save(state_dict("resnet101", 0.0625), tmp_path / "a.pth")
    file = tmp_path / f"converted{suffix}"
    convert(tmp_path / "a.pth", output=file, pixel_mean=(1, 2, 3), pixel_format="BGR", proof=False)
    cfg, said = settle(file)
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS) == (101, 4)
    assert (cfg.MODEL.PIXEL_MEAN, cfg.INPUT.FORMAT) == ([1, 2, 3], "BGR")
    assert "MODEL.RESNETS.DEPTH 101" in said
    load_weights(build_detector(cfg), str(file))


@pytest.mark.parametrize("name", [*SETTINGS, "depth"])
def test_a_contradiction_with_the_command_line_is_refused(rewritten, voc, tmp_path, capsys, name):
    value, key, explicit = SETTINGS.get(name, (50, "MODEL.RESNETS.DEPTH", "101"))
    file = rewritten(**{name: value})
    args = ["--config", "VOC", "--train-data", voc[0], "--output-dir", str(tmp_path / "run")]
    assert train_net([*args, "MODEL.WEIGHTS", str(file), *QUICK, key, explicit]) == 1
    error = capsys.readouterr().err
    assert f"{key} is set to {explicit}, but {file} requires {value}: remove the setting" in error
    assert not (tmp_path / "run").exists()


def test_a_contradiction_with_the_users_own_file_is_refused(rewritten, voc, tmp_path, capsys):
    weights, config = rewritten(format="RGB"), tmp_path / "own.yaml"
    config.write_text("_BASE_: VOC\nINPUT:\n  FORMAT: BGR\n")
    args = ["--config", str(config), "--train-data", voc[0], "--output-dir", str(tmp_path / "run")]
    assert train_net([*args, "MODEL.WEIGHTS", str(weights), *QUICK]) == 1
    assert f"INPUT.FORMAT is set to BGR, but {weights} requires RGB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "layout", ["reference.pkl", "reference.pth", "names.pth", "detectron2.pkl"]
)
def test_files_without_metadata_load_with_the_protocols_statistics(settle, tmp_path, layout):
    arrays = narrow_backbone()
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    heuristics = {"__author__": "MOCO", "matching_heuristics": True}
    tree = {
        "reference.pkl": {"model": arrays, **heuristics},
        "reference.pth": {"model": tensors, **heuristics},
        "names.pth": tensors,
        "detectron2.pkl": {"model": arrays, "__author__": "Detectron2 Model Zoo"},
    }[layout]
    path = tmp_path / layout
    if path.suffix == ".pth":
        torch.save(tree, path)
    else:
        path.write_bytes(pickle.dumps(tree))
    cfg, said = settle(path)
    assert "no pixel statistics in the file: using the protocol's, in RGB order" in said
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.RESNETS.STEM_OUT_CHANNELS == 4
    model = build_detector(cfg)
    load_weights(model, str(path))
    state = model.state_dict()
    for name, array in arrays.items():
        owner = "roi_heads." if name.startswith("res5.") else "backbone."
        np.testing.assert_array_equal(state[owner + name].numpy(), array)


class _Python2(pickle._Pickler):
    """Protocol 2 as Python 2 wrote it: texts and bytes are both byte strings."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, text):
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text


def write_caffe2(path, arrays, norm="bn"):
    """Detectron's R-50.pkl (or R-50-GN.pkl): blobs by Caffe2's names, BN folded, a bias, a
    classifier."""
    parts = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    blobs = {
        "conv1_b": np.full(len(arrays["stem.conv1.weight"]), 7, np.float32),
        "fc1000_w": np.ones((9, 128), np.float32),
        "fc1000_b": np.ones(9, np.float32),
        "res2_0_branch2a_w_momentum": np.ones(3, np.float32),
    }
    for name, array in arrays.items():
        *module, leaf = name.split(".")
        if leaf.startswith("running_"):
            continue
        normed = "norm" in module
        if module[0] == "stem":
            blob = ("res_conv1_bn" if norm == "bn" else "conv1_gn") if normed else "conv1"
        else:
            blob = f"{module[0]}_{module[1]}_{parts[module[2]]}" + f"_{norm}" * normed
        suffix = {"weight": "s" if normed else "w", "bias": "b"}[leaf]
        blobs[f"{blob}_{suffix}"] = array
    with path.open("wb") as file:
        _Python2(file, protocol=2).dump(blobs)
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    return path


@pytest.fixture
def caffe2_file(tmp_path):
    """MSRA's R-50.pkl, narrow."""
    return write_caffe2(tmp_path / "R-50.pkl", narrow_backbone())


@pytest.mark.parametrize("protocol", ["VOC-supervised", "COCO-FPN-1x-supervised"])
def test_a_caffe2_file_fills_the_supervised_protocols_as_detectron2_does(
    settle, caffe2_file, protocol
):
    cfg, said = settle(caffe2_file, config=protocol)
    assert "no pixel statistics" not in said
    layout = ("MODEL.PIXEL", "INPUT.FORMAT", "STRIDE_IN_1X1")
    assert not any(key in said for key in layout)  # the protocol has them already
    torch.manual_seed(0)
    ours = build_detector(cfg)
    torch.manual_seed(0)
    theirs = build_detector(cfg)
    load_weights(ours, str(caffe2_file))
    DetectionCheckpointer(theirs).load(str(caffe2_file))
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    stem = next(t for name, t in expected.items() if name.endswith("stem.conv1.weight"))
    np.testing.assert_array_equal(stem.numpy(), narrow_backbone()["stem.conv1.weight"])


def test_a_caffe2_file_brings_its_own_pixels_and_strides_into_any_protocol(settle, caffe2_file):
    cfg, said = settle(caffe2_file, config="VOC")
    supervised = load_config("VOC-supervised")
    for _, key, _ in SETTINGS.values():
        assert value_of(cfg, key) == value_of(supervised, key)
        assert key in said
    assert all(".conv1.bias" not in name for name in read_backbone(str(caffe2_file)).tensors)


class _Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return __import__("os").mkdir, (str(self.trace),)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), np.zeros((40, 50, 3), np.uint8))
    return str(path)


@pytest.fixture
def a_run(tmp_path):
    """A run directory with a checkpoint yet to be written."""
    run = tmp_path / "run"
    run.mkdir()
    classes = ["DATASETS.CLASSES", "['bolt', 'nut']", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    (run / "config.yaml").write_text(load_config("VOC-random", [*NARROW, *QUICK, *classes]).dump())
    (run / "last_checkpoint").write_text("model_final.pth")
    return run


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize(
    "way",
    ["weights", "architecture", "eval-only", "eval-only of a run", "resume", "predict",
     "predict of a run"],
)  # fmt: skip
def test_no_way_into_a_tool_runs_what_a_checkpoint_says(
    way, kind, voc, a_run, photo, tmp_path, capsys
):
    trace, file = tmp_path / "executed", a_run / "model_final.pth"
    tree = {"model": {"backbone.stem.conv1.weight": _Evil(trace)}, "trainer": {}}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(tree))
    else:
        torch.save(tree, file, _use_new_zipfile_serialization=kind == "zip")
    data = ["--train-data", voc[0], "--test-data", voc[1]]
    new = ["--output-dir", str(tmp_path / "new")]
    arguments = {
        "weights": ["--config", "VOC", *data, *new, "MODEL.WEIGHTS", str(file)],
        "architecture": [
            "--config", "VOC-random", *data, *new, "MODEL.ARCHITECTURE_FROM", str(file)
        ],
        "eval-only": ["--config", "VOC", *data, *new, "--eval-only", "MODEL.WEIGHTS", str(file)],
        "eval-only of a run": ["--eval-only", *data, "--output-dir", str(a_run)],
        "resume": ["--resume", *data, "--output-dir", str(a_run), "MODEL.DEVICE", "cpu"],
        "predict": [photo, "-o", str(tmp_path / "o"), "--config", "VOC", "--weights", str(file)],
        "predict of a run": [photo, "-o", str(tmp_path / "o"), "--run", str(a_run)],
    }[way]  # fmt: skip
    assert (predict if "predict" in way else train_net)(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]  # after a warning of what is passed over
    assert error.startswith("error: ")
    assert "nothing was executed" in error
    assert not trace.exists()


@pytest.mark.parametrize(
    "way", ["config", "base", "eval-only", "resume", "predict", "predict, base", "predict of a run"]
)
def test_no_way_into_a_tool_runs_what_a_config_says(way, a_run, photo, tmp_path, capsys):
    trace, file, heir = tmp_path / "executed", a_run / "config.yaml", tmp_path / "heir.yaml"
    file.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{trace}']\n")
    heir.write_text(f"_BASE_: {file}\n")
    weights = str(a_run / "model_final.pth")
    (a_run / "model_final.pth").touch()
    drawn = [photo, "-o", str(tmp_path / "o")]
    arguments = {
        "config": ["--config", str(file)],
        "base": ["--config", str(heir)],
        "eval-only": ["--eval-only", "--output-dir", str(a_run)],
        "resume": ["--resume", "--output-dir", str(a_run)],
        "predict": [*drawn, "--config", str(file), "--weights", weights],
        "predict, base": [*drawn, "--config", str(heir), "--weights", weights],
        "predict of a run": [*drawn, "--run", str(a_run)],
    }[way]
    assert (predict if "predict" in way else train_net)(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert f"{file} is not plain YAML (Python tags are refused)" in error
    assert not trace.exists()

"""Conversion end to end: files, names, identity, the account, metadata, and the command line."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from torch import Tensor

import moco_det
from moco_det.conversion import CheckpointError, Converted, convert, load_detectron2_weights
from tests.moco_det.convert_cases import (
    ARCHITECTURES,
    backbone,
    linear,
    prefixed,
    reference_conversion,
    same,
    state_dict,
)


def _moco(tensors: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    query = tensors | linear("fc.2", 8, 8)
    key = {k: v + 1 for k, v in query.items()}
    state = prefixed("encoder_q.", query) | prefixed("encoder_k.", key)
    state |= {"queue": torch.randn(8, 16), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"state_dict": state, **more}


def _save(path: Path, tree: Any) -> Path:
    torch.save(tree, path)
    return path


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    tree = _moco(
        backbone(state_dict("resnet50", 0.25)),
        format="moco-det/pretrain/1",
        config="MODEL:\n  DEPTH: 50\n",
        optimizer={"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        rng={"torch": [torch.get_rng_state()]},
        step=7,
    )
    return _save(tmp_path / "checkpoint_last.pth", tree)


def test_the_file_is_what_the_references_converter_writes_for_the_backbone(
    tmp_path: Path, ours: Path
) -> None:
    convert(ours, output=tmp_path / "a.pkl")
    written = pickle.loads((tmp_path / "a.pkl").read_bytes())
    expected = reference_conversion(backbone(state_dict("resnet50", 0.25)))
    assert set(written) == {"model", "__author__", "matching_heuristics", "metadata"}
    assert (written["__author__"], written["matching_heuristics"]) == ("MOCO", True)
    assert set(written["model"]) == set(expected)
    for name, array in written["model"].items():
        assert type(array) is np.ndarray
        assert array.dtype == (np.int64 if name.endswith("num_batches_tracked") else np.float32)
        np.testing.assert_array_equal(array, expected[name].numpy())
    assert "stem.fc.2.weight" not in written["model"]


@pytest.mark.parametrize(
    "config",
    [
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    ],
)
def test_detectron2s_own_checkpointer_loads_the_file_and_what_it_saves_comes_back_out(
    tmp_path: Path, config: str
) -> None:
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    tensors = backbone(state_dict("resnet50", 0.125))
    _save(tmp_path / "a.pth", tensors)
    converted = convert(tmp_path / "a.pth", output=tmp_path / "a.pkl", proof=False)
    cfg = model_zoo.get_config(config)
    cfg.MODEL.DEVICE = "cpu"
    for key in ("stem_out_channels", "res2_out_channels", "width_per_group", "stride_in_1x1"):
        cfg.MODEL.RESNETS[key.upper()] = converted.metadata[key]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(tmp_path / "a.pkl"))
    state = model.state_dict()
    missing = []
    for name, value in converted.tensors.items():
        own = [key for key in state if key.endswith(f".{name}")]  # whatever module owns it
        if own:
            assert torch.equal(state[own[0]], value), name
        else:
            missing.append(name)
    assert not missing

    DetectionCheckpointer(model, str(tmp_path)).save("model_final", iteration=3)
    back = convert(tmp_path / "model_final.pth", "torchvision")
    assert same(back.tensors, tensors)
    assert back.report.source == "Detectron2"
    assert set(back.report.dropped) <= {"detection head", "feature pyramid", "head"}


@pytest.mark.parametrize(
    ("name", "width"),
    [
        *((name, 0.25 if name == "resnext50_32x4d" else 0.125) for name in ARCHITECTURES),
        ("resnet50", 0.5),
    ],
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_there_and_back_is_the_identity_bit_for_bit(
    tmp_path: Path, name: str, width: float, suffix: str
) -> None:
    tensors = backbone(state_dict(name, width))
    _save(tmp_path / "a.pth", tensors)
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.pth"
    one = convert(tmp_path / "a.pth", output=there, proof=False)
    two = convert(there, "torchvision", output=back, proof=suffix == ".pkl" and "50" in name)
    assert same(two.tensors, tensors)
    assert same(torch.load(back), tensors)
    again = convert(back, "detectron2", proof=False)
    assert same(again.tensors, one.tensors)
    for key in set(one.metadata) - {"source_sha256"}:
        assert again.metadata[key] == one.metadata[key], key


def test_torchvision_loads_the_state_dict_strictly(tmp_path: Path) -> None:
    model = torchvision.models.resnet18()
    _save(tmp_path / "a.pth", {"model": reference_conversion(backbone(model.state_dict()))})
    convert(tmp_path / "a.pth", "torchvision", output=tmp_path / "b.pth")
    other = torchvision.models.resnet18()
    other.fc = model.fc = torch.nn.Identity()
    other.load_state_dict(torch.load(tmp_path / "b.pth"), strict=True)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_the_safetensors_file_is_one_to_its_own_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors")
    tensors = backbone(state_dict())
    _save(tmp_path / "a.pth", tensors)
    convert(tmp_path / "a.pth", "torchvision", output=tmp_path / "a.safetensors", proof=False)
    with library.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118
        assert json.loads(file.metadata()["moco-det"])["depth"] == 18


def test_every_tensor_of_the_file_is_in_the_account(ours: Path) -> None:
    report = convert(ours, proof=False).report
    flat = torch.load(ours)["state_dict"]
    assert len(report.entries) == len(flat) + 2  # a momentum buffer and a random state
    assert report.mapped == len(backbone(state_dict("resnet50")))
    assert report.dropped == {
        "projection head": 2,
        "momentum encoder": report.mapped + 2,
        "queue": 2,
        "optimiser": 1,
        "random state": 1,
    }
    table = report.table()
    assert "state_dict.encoder_q.conv1.weight" in table
    assert "-> stem.conv1.weight" in table
    assert "dropped: queue" in table
    assert f"{report.mapped} mapped" in str(report)


def test_metadata_describe_the_network_and_where_it_came_from(tmp_path: Path, ours: Path) -> None:
    import hashlib

    convert(ours, output=tmp_path / "a.pkl")
    metadata = load_detectron2_weights(tmp_path / "a.pkl").metadata
    assert metadata is not None
    assert metadata | {"version": "", "encoder": ""} == {
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "format": "RGB",
        "stride_in_1x1": False,
        "depth": 50,
        "num_groups": 1,
        "width_per_group": 16,
        "stem_out_channels": 16,
        "res2_out_channels": 64,
        "source": "moco-det",
        "source_sha256": hashlib.sha256(ours.read_bytes()).hexdigest(),
        "version": "",
        "encoder": "",
    }


def test_the_other_encoder_is_taken_when_asked_for(ours: Path) -> None:
    query, key = convert(ours, proof=False), convert(ours, encoder="key", proof=False)
    name = "stem.conv1.weight"
    assert torch.equal(key.tensors[name], query.tensors[name] + 1)
    assert "query encoder" in key.report.dropped
    assert "query and key" in str(query.report)
    with pytest.raises(CheckpointError, match="--encoder teacher") as caught:
        convert(ours, encoder="teacher")
    assert caught.value.candidates == ("query", "key")


def test_the_references_file_loads_without_metadata(tmp_path: Path) -> None:
    expected = reference_conversion(backbone(state_dict()))
    arrays = {name: tensor.numpy() for name, tensor in expected.items()}
    file = {"model": arrays, "__author__": "MOCO", "matching_heuristics": True}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(file))
    weights = load_detectron2_weights(tmp_path / "a.pkl")
    assert weights.metadata is None
    assert (weights.author, weights.matching_heuristics) == ("MOCO", True)
    assert same(weights.tensors, expected)


def test_the_extra_norm_after_res5_stays_with_the_detector(tmp_path: Path) -> None:
    tensors = backbone(state_dict("resnet50", 0.125))
    model = {
        f"roi_heads.{name}" if name.startswith("res5") else f"backbone.{name}": value
        for name, value in reference_conversion(tensors).items()
    }
    model |= linear("roi_heads.res5.norm", 9) | linear("roi_heads.box_predictor.cls_score", 3, 8)
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}}
    _save(tmp_path / "model_final.pth", {"model": model, "optimizer": optimizer, "iteration": 9})
    converted = convert(tmp_path / "model_final.pth", "torchvision", proof=False)
    assert same(converted.tensors, tensors)
    assert converted.report.dropped == {"detection head": 4, "optimiser": 1}


def test_a_detectors_config_beside_it_tells_stride_and_pixels(tmp_path: Path) -> None:
    model = prefixed("backbone.", reference_conversion(backbone(state_dict("resnet50", 0.125))))
    path = _save(tmp_path / "model_final.pth", {"model": model})
    assert any("states neither" in note for note in convert(path, proof=False).report.notes)
    config = {
        "MODEL": {
            "PIXEL_MEAN": [103.53, 116.28, 123.675],
            "PIXEL_STD": [1.0, 1.0, 1.0],
            "RESNETS": {"STRIDE_IN_1X1": True},
        },
        "INPUT": {"FORMAT": "BGR"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    metadata = convert(path).metadata
    assert (metadata["format"], metadata["stride_in_1x1"]) == ("BGR", True)
    assert metadata["pixel_std"] == [1, 1, 1]
    with pytest.raises(CheckpointError, match="STRIDE_IN_1X1"):
        convert(path, "torchvision")
    assert convert(path, "torchvision", stride_in_1x1=False).metadata["format"] == "BGR"


def test_half_and_double_precision_become_single_and_are_said(tmp_path: Path) -> None:
    tensors = backbone(state_dict())
    for dtype in (torch.float16, torch.float64):
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        converted = convert(_save(tmp_path / "a.pth", cast), "torchvision")
        assert all(t.dtype in (torch.float32, torch.int64) for t in converted.tensors.values())
        name = "layer1.0.conv1.weight"
        assert torch.equal(converted.tensors[name], cast[name].float())
        assert str(dtype) in " ".join(converted.report.notes)


def test_a_width_that_detectron2s_config_refuses_is_said(tmp_path: Path) -> None:
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_resnet_backbone

    converted = convert(_save(tmp_path / "a.pth", backbone(state_dict("resnet18", 0.25))))
    assert any("cannot build" in note for note in converted.report.notes)
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = converted.metadata["res2_out_channels"]
    with pytest.raises(AssertionError, match="64"):
        build_resnet_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_what_is_returned_survives_the_file_and_owns_no_more_than_itself(
    tmp_path: Path, suffix: str
) -> None:
    tensors = backbone(state_dict())
    convert(_save(tmp_path / "a.pth", tensors), output=tmp_path / f"b{suffix}", proof=False)
    path = tmp_path / f"b{suffix}"
    converted = convert(path, "torchvision", proof=False)
    path.write_bytes(b"")
    assert same(converted.tensors, tensors)
    for tensor in converted.tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_layouts_in_memory_do_not_change_what_is_converted(tmp_path: Path) -> None:
    """Oracle: the same tensors, contiguous. Saved are channels last, and views of one storage."""
    tensors = backbone(state_dict())
    flat = torch.cat([t.flatten() for t in tensors.values() if t.is_floating_point()])
    views, start = dict(tensors), 0
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()
    last = {
        k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v
        for k, v in tensors.items()
    }
    for saved in (views, last):
        assert same(convert(_save(tmp_path / "a.pth", saved), "torchvision").tensors, tensors)


def test_odd_values_are_reported(tmp_path: Path) -> None:
    tensors = backbone(state_dict())
    tensors["layer1.0.bn1.running_mean"].zero_()
    tensors["layer1.0.bn1.running_var"].fill_(1)
    tensors["layer2.0.conv1.weight"].zero_()
    warnings = " ".join(convert(_save(tmp_path / "a.pth", tensors)).report.warnings)
    assert "1 of 20 norms were never updated" in warnings
    assert "layer1.0.bn1" in warnings
    assert "all-zero weights in layer2.0.conv1.weight" in warnings
    tensors["layer3.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    path = _save(tmp_path / "a.pth", tensors)
    assert "NaN" in " ".join(convert(path, proof=False).report.warnings)
    with pytest.raises(CheckpointError, match=r"layer3\.0\.conv1\.weight \(1 of") as caught:
        convert(path, output=tmp_path / "a.pkl")
    assert caught.value.kind == "proof"


def test_nothing_is_written_when_the_proof_fails(
    tmp_path: Path, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moco_det.conversion.converter as converter

    def rename_badly(name: str) -> str | None:  # two norms change places on the way out
        swapped = name.replace("layer3.0.bn1", "*").replace("layer3.0.bn2", "layer3.0.bn1")
        return right(swapped.replace("*", "layer3.0.bn2"))

    right = converter.to_detectron2
    (tmp_path / "a.pkl").write_text("the old file")
    monkeypatch.setattr(converter, "to_detectron2", rename_badly)
    with pytest.raises(CheckpointError, match="nothing was written") as caught:
        convert(ours, output=tmp_path / "a.pkl")
    assert caught.value.kind == "proof"
    assert "FAILS" in caught.value.details
    assert (tmp_path / "a.pkl").read_text() == "the old file"
    assert {p.name for p in tmp_path.iterdir()} == {"a.pkl", ours.name}


def _tool(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int | None, str, str]:
    from tools.convert import main

    status = main([str(a) for a in argv])
    return status, *capsys.readouterr()


def test_the_command_line_prints_the_account_and_the_proof(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = _tool(capsys, ours)
    assert not status
    for words in ("moco-det", "ResNet-50, width x0.25", "318 mapped", "res5", "holds", ".pkl"):
        assert words in out
    assert ours.with_suffix(".pkl").exists()
    status, out, _ = _tool(capsys, ours.with_suffix(".pkl"), "--to", "torchvision", "--verbose")
    assert "-> layer4.2.conv3.weight" in out
    assert ours.with_name("checkpoint_last_torchvision.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.pth"], "does not exist"),
        (["OURS", "-o", "OURS"], "is an input"),
        (["OURS", "-o", "a.onnx"], ".pkl, .pth, .safetensors"),
        (["OURS", "--to", "torchvision", "-o", "a.pkl"], ".pth, .safetensors"),
        (["OURS", "--prefix", "nowhere."], "--prefix nowhere."),
        (["OURS", "--source", "nobody"], "--source nobody"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    ours: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    status, out, err = _tool(capsys, *(str(ours) if a == "OURS" else a for a in arguments))
    assert status == 1
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_the_package_exports_the_function(ours: Path) -> None:
    assert moco_det.convert is convert
    assert isinstance(convert(ours, proof=False), Converted)

"""Every known layout is recognised from its own structure; what Detectron2 cannot hold is named.

Where the project's own package installs, its real model is saved its own way; the other layouts
are written with the true names and shapes of a narrow ResNet-18.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from moco_common.backbone.layouts import SOURCES
from moco_det.conversion import CheckpointError, convert
from tests.moco_det.convert_cases import (
    backbone,
    linear,
    prefixed,
    reference_conversion,
    same,
    sequential,
    state_dict,
)

Tensors = dict[str, Tensor]
NET = state_dict()
BODY = backbone(NET)
OTHER = {key: value + 1 for key, value in BODY.items()}
HEAD = linear("0", 8, 64) | linear("2", 4, 8)


def _wrap(tensors: Tensors) -> Tensors:
    return prefixed("module.", tensors)


def _moco(wrap: Callable[[Tensors], Tensors] = _wrap) -> dict[str, Any]:
    query = BODY | linear("fc.0", 8, 64) | linear("fc.2", 4, 8)
    state = prefixed("encoder_q.", query) | prefixed("encoder_k.", OTHER)
    state |= {"queue": torch.randn(4, 8), "queue_ptr": torch.zeros(1)}
    return {"epoch": 1, "arch": "resnet18", "state_dict": wrap(state), "optimizer": {"state": {}}}


def _simsiam() -> dict[str, Any]:
    state = prefixed("encoder.", BODY | prefixed("fc.", HEAD)) | prefixed("predictor.", HEAD)
    return {"state_dict": _wrap(state), "arch": "resnet18"}


def _pixpro() -> dict[str, Any]:
    state = prefixed("encoder.", BODY) | prefixed("encoder_k.", OTHER)
    state |= prefixed("projector.", HEAD) | prefixed("projector_k.", HEAD)
    return {"model": _wrap(state | prefixed("value_transform.", HEAD)), "opt": {"state": {}}}


def _barlow() -> dict[str, Any]:
    state = prefixed("backbone.", BODY) | prefixed("projector.", HEAD)
    state |= {"bn.running_mean": torch.zeros(8), "bn.running_var": torch.ones(8)}
    return {"epoch": 3, "model": _wrap(state), "optimizer": {}}


def _byol(online: str, target: str, **more: Tensors) -> Tensors:
    state = prefixed(online, BODY) | prefixed(target, OTHER)
    return state | prefixed("online_predictor.", HEAD) | more.get("more", {})


def _openselfsup() -> dict[str, Any]:
    state = prefixed("backbone.", BODY) | prefixed("encoder_q.0.", BODY)
    state |= prefixed("encoder_q.1.mlp.", HEAD) | prefixed("encoder_k.0.", OTHER)
    state |= prefixed("encoder_k.1.mlp.", HEAD) | {"queue": torch.ones(4), "queue2": torch.ones(4)}
    return {"meta": {"epoch": 200, "mmcv_version": "1"}, "state_dict": state, "optimizer": {}}


def _solo(name: str) -> dict[str, Any]:
    state = prefixed(f"{name}.", BODY) | prefixed(f"momentum_{name}.", OTHER)
    state |= linear("classifier", 10, 64) | prefixed("projector.", HEAD)
    state |= prefixed("momentum_projector.", HEAD) | {"queue": torch.ones(2, 3)}
    return {"pytorch-lightning_version": "1.9.0", "state_dict": state, "callbacks": {"x": 1}}


def _vissl() -> dict[str, Any]:
    model = {
        "trunk": prefixed("_feature_blocks.", BODY),
        "heads": prefixed("0.clf.", HEAD),
    }
    loss = {"queue": torch.ones(3)}
    return {"classy_state_dict": {"base_model": {"model": model}, "loss": loss, "optim": {}}}


def _dino(prefix: str) -> dict[str, Any]:
    student = prefixed("module.backbone.", OTHER) | prefixed("module.head.mlp.", HEAD)
    teacher = prefixed(f"{prefix}backbone.", BODY) | prefixed(f"{prefix}head.last_layer.", HEAD)
    loss = {"center": torch.zeros(1, 4)}
    return {"student": student, "teacher": teacher, "dino_loss": loss, "args": {"arch": "resnet18"}}


LAYOUTS: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "moco": ("MoCo", "query", _moco),
    "moco, one GPU": ("MoCo", "query", lambda: _moco(dict)),
    "moco, bare": ("MoCo", "query", lambda: _moco()["state_dict"]),
    "moco v3": (
        "MoCo v3",
        "base",
        lambda: {
            "state_dict": _wrap(
                prefixed("base_encoder.", BODY | prefixed("fc.", HEAD))
                | prefixed("momentum_encoder.", OTHER)
                | prefixed("predictor.", HEAD)
            )
        },
    ),
    "ours": ("moco-det", "query", lambda: _moco(dict) | {"format": "moco-det/pretrain/1"}),
    "simsiam": ("SimSiam", "encoder", _simsiam),
    "pixpro": ("PixPro", "query", _pixpro),
    "swav": (
        "SwAV",
        "backbone",
        lambda: _wrap(BODY | prefixed("projection_head.", HEAD) | linear("prototypes", 30, 4)),
    ),
    "barlow twins": ("Barlow Twins", "backbone", _barlow),
    "vicreg": (
        "VICReg",
        "backbone",
        lambda: {"model": _wrap(prefixed("backbone.", BODY) | prefixed("projector.", HEAD))},
    ),
    "barlow twins / vicreg / dino, bare": ("torchvision / timm", "backbone", lambda: BODY),
    "byol, lucidrains": (
        "BYOL",
        "online",
        lambda: _byol("online_encoder.net.", "target_encoder.net.", more=prefixed("net.", BODY)),
    ),
    "byol, network": (
        "BYOL",
        "online",
        lambda: {"model": _byol("online_network.encoder.", "target_network.encoder.")},
    ),
    "byol, two dictionaries": (
        "BYOL",
        "online",
        lambda: {
            "online_network_state_dict": prefixed("encoder.", sequential(BODY)),
            "target_network_state_dict": prefixed("encoder.", sequential(OTHER)),
        },
    ),
    "densecl, whole": ("DenseCL / DetCo / mmselfsup", "backbone", _openselfsup),
    "mmselfsup": (
        "DenseCL / DetCo / mmselfsup",
        "backbone",
        lambda: {
            "meta": {},
            "state_dict": prefixed("backbone.", BODY)
            | prefixed("neck.fc", HEAD)
            | {"data_preprocessor.mean": torch.zeros(3, 1, 1)},
        },
    ),
    "densecl, detco, bare": (
        "torchvision / timm",
        "backbone",
        lambda: {"state_dict": BODY, "author": "x"},
    ),
    "densecl, epoch_N": (
        "DenseCL / DetCo / mmselfsup",
        "backbone",
        lambda: {
            "meta": {},
            "state_dict": prefixed("encoder_q.0.", BODY)
            | prefixed("encoder_q.1.mlp.", HEAD)
            | prefixed("encoder_q.1.mlp2.", HEAD)
            | prefixed("encoder_k.0.", OTHER)
            | prefixed("backbone.", BODY)
            | {"queue": torch.ones(4), "queue2": torch.ones(4), "queue2_ptr": torch.zeros(1)},
        },
    ),
    "moco, main_lincls": (
        "torchvision / timm",
        "backbone",
        lambda: {
            "arch": "resnet18",
            "state_dict": _wrap(NET),
            "best_acc1": torch.tensor([67.5]),
        },
    ),
    "averaged model": (
        "torchvision / timm",
        "backbone",
        lambda: {"n_averaged": torch.tensor(3), **_wrap(NET)},
    ),
    "lightly, as its benchmarks": (
        "lightly",
        "backbone",
        lambda: {
            "pytorch-lightning_version": "2.0",
            "hyper_parameters": {},
            "state_dict": prefixed("backbone.", BODY)
            | prefixed("projection_head.layers.", HEAD)
            | prefixed("query_backbone.", OTHER)
            | prefixed("query_projection_head.layers.", HEAD)
            | linear("online_classifier.classification_head", 10, 64),
        },
    ),
    "lightning, a classifier": (
        "Lightning",
        "backbone",
        lambda: {
            "pytorch-lightning_version": "2.0",
            "state_dict": prefixed("backbone.", BODY) | linear("classifier", 10, 64),
        },
    ),
    "solo-learn": ("solo-learn", "online", lambda: _solo("backbone")),
    "solo-learn, old": ("solo-learn", "online", lambda: _solo("encoder")),
    "vissl": ("VISSL", "trunk", _vissl),
    "dino": ("DINO", "teacher", lambda: _dino("")),
    "dino, wrapped": ("DINO", "teacher", lambda: _dino("module.")),
    "lightning": (
        "Lightning",
        "backbone",
        lambda: {
            "pytorch-lightning_version": "2.0",
            "state_dict": prefixed("model.resnet.", NET | linear("fc", 10, 64)),
        },
    ),
    "torchvision": ("torchvision / timm", "backbone", lambda: NET),
    "compiled": ("torchvision / timm", "backbone", lambda: prefixed("_orig_mod.", NET)),
    "detectron2": ("Detectron2", "backbone", lambda: {"model": reference_conversion(BODY)}),
    "own names": ("unnamed project", "backbone", lambda: prefixed("trunk.body.", BODY)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recognised_and_its_encoder_comes_out_whole(
    tmp_path: Path, layout: str
) -> None:
    source, encoder, make = LAYOUTS[layout]
    torch.save(make(), tmp_path / "a.pth")
    converted = convert(tmp_path / "a.pth", "torchvision", proof=False)
    assert (converted.report.source, converted.report.encoder) == (source, encoder)
    assert converted.metadata["source"] == source
    assert same(converted.tensors, BODY)
    assert converted.report.mapped == len(BODY)


def test_every_source_of_the_table_has_a_case() -> None:
    assert {source.name for source in SOURCES} == {case[0] for case in LAYOUTS.values()}


@pytest.mark.parametrize(
    ("layout", "encoder"),
    [("moco", "key"), ("dino", "student"), ("byol, network", "target"), ("solo-learn", "momentum")],
)
def test_the_other_encoder_is_one_option_away(tmp_path: Path, layout: str, encoder: str) -> None:
    torch.save(LAYOUTS[layout][2](), tmp_path / "a.pth")
    converted = convert(tmp_path / "a.pth", "torchvision", encoder=encoder, proof=False)
    assert same(converted.tensors, OTHER)
    assert converted.metadata["encoder"] == encoder


def test_several_unknown_encoders_ask_for_a_prefix(tmp_path: Path) -> None:
    tree = prefixed("left.", BODY) | prefixed("right.", OTHER)
    torch.save(_wrap(tree), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="--prefix") as caught:
        convert(tmp_path / "a.pth")
    assert set(caught.value.candidates) == {"left.", "right."}
    for prefix in ("right.", "right", "module.right."):
        converted = convert(tmp_path / "a.pth", "torchvision", prefix=prefix, proof=False)
        assert same(converted.tensors, OTHER)


def test_a_source_can_be_demanded(tmp_path: Path) -> None:
    torch.save(prefixed("backbone.", BODY), tmp_path / "a.pth")
    converted = convert(tmp_path / "a.pth", source="vicreg", proof=False)
    assert converted.report.source == "VICReg"
    with pytest.raises(CheckpointError, match="--source dino is not in the file"):
        convert(tmp_path / "a.pth", source="dino")


def test_a_tensor_that_nothing_explains_is_an_error_until_it_is_dropped(tmp_path: Path) -> None:
    torch.save(_wrap(BODY | {"layer1.0.gate.weight": torch.ones(2)}), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"module\.layer1\.0\.gate\.weight") as caught:
        convert(tmp_path / "a.pth")
    assert caught.value.kind == "unknown_tensor"
    report = convert(tmp_path / "a.pth", drop=[r"\.gate\."], proof=False).report
    assert report.dropped == {"--drop": 1}


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("best_acc1", (1,), "training state"),
        ("n_averaged", (), "training state"),
        ("module.logit_scale", (), "training state"),
        ("module.train_acc.tp", (10,), "training state"),
        ("module.val_metrics.MulticlassF1Score.fn", (10,), "training state"),
        ("module.confmat", (10, 10), "training state"),
        ("text.transformer.weight", (4, 4), "outside the encoder"),
        ("positional_embedding", (77, 8), "outside the encoder"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "visual."])
def test_a_loose_tensor_that_is_no_part_of_the_encoder_is_left_out_and_accounted_for(
    tmp_path: Path, name: str, shape: tuple[int, ...], why: str, prefix: str
) -> None:
    torch.save({"state_dict": prefixed(prefix, BODY), name: torch.ones(shape)}, tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", proof=False).report
    assert report.mapped == len(BODY)
    assert sum(report.dropped.values()) == 1
    if not prefix.startswith(name.split(".")[0]):
        assert set(report.dropped) <= {why, "outside the encoder"}


@pytest.mark.parametrize("name", ["layer1.0.skip_gain", "layer2.gate", "conv1.scale", "adapter.a"])
def test_a_tensor_inside_the_encoder_is_never_left_out_unasked(tmp_path: Path, name: str) -> None:
    torch.save(prefixed("visual.", BODY | {name: torch.ones(())}), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=name) as caught:
        convert(tmp_path / "a.pth")
    assert caught.value.kind == "unknown_tensor"


def test_a_missing_tensor_is_named_with_the_nearest_candidates(tmp_path: Path) -> None:
    tree = dict(BODY)
    tree["layer3.0.bn1.runing_var"] = tree.pop("layer3.0.bn1.running_var")
    torch.save(prefixed("encoder_q.", tree), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="which is missing") as caught:
        convert(tmp_path / "a.pth")
    assert caught.value.key == "encoder_q.layer3.0.bn1.running_var"
    assert caught.value.candidates[0] == "encoder_q.layer3.0.bn1.runing_var"


def test_a_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    torch.save(BODY | {"layer3.1.conv2.weight": torch.ones(32, 31, 3, 3)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"\(32, 31, 3, 3\).*\(32, 32, 3, 3\)"):
        convert(tmp_path / "a.pth")


@pytest.mark.parametrize("momentum", [False, True])
def test_lightlys_own_model_is_converted(tmp_path: Path, momentum: bool) -> None:
    modules = pytest.importorskip("lightly.models.modules")
    utils = pytest.importorskip("lightly.models.utils")

    class Model(nn.Module):
        """As in its documentation."""

        def __init__(self) -> None:
            super().__init__()
            resnet = torchvision.models.resnet18()
            self.backbone = nn.Sequential(*list(resnet.children())[:-1])
            self.projection_head = modules.MoCoProjectionHead(512, 512, 128)
            if momentum:
                self.backbone_momentum = nn.Sequential(
                    *list(torchvision.models.resnet18().children())[:-1]
                )
                self.projection_head_momentum = modules.MoCoProjectionHead(512, 512, 128)
                utils.deactivate_requires_grad(self.backbone_momentum)

    model = Model()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.ckpt")
    converted = convert(tmp_path / "a.ckpt")
    assert converted.report.source == "lightly"
    assert set(converted.report.dropped) == (
        {"projection head", "momentum encoder"} if momentum else {"projection head"}
    )
    layer = model.state_dict()["backbone.4.0.conv1.weight"]
    assert torch.equal(converted.tensors["res2.0.conv1.weight"], layer)
    assert len(converted.tensors) == len(model.backbone.state_dict())


def _timm(name: str) -> Tensors:
    model = pytest.importorskip("timm").create_model(name, num_classes=2)
    return model.state_dict()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("resnet18", "ResNet-18"),
        ("resnext50_32x4d", "ResNeXt-50 32x4d"),
        ("wide_resnet50_2", "Wide ResNet-50-2"),
    ],
)
def test_timms_own_models_are_converted(tmp_path: Path, name: str, architecture: str) -> None:
    tensors = _timm(name)
    torch.save(tensors, tmp_path / "a.pth")
    converted = convert(tmp_path / "a.pth", "torchvision", proof=name == "resnet18")
    assert str(converted.report.architecture) == architecture
    assert same(converted.tensors, backbone(dict(tensors)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet26d", "deep stem"),
        ("resnet50_gn", "GroupNorm"),
        ("seresnet18", "channel attention"),
        ("resnet26", "ResNet-26"),
        ("res2net50_26w_4s", "Res2Net"),
        ("vit_tiny_patch16_224", "Vision Transformer"),
        ("swin_tiny_patch4_window7_224", "Swin"),
        ("regnetx_002", "RegNet"),
        ("convnext_atto", "ConvNeXt"),
        ("efficientnet_b0", "EfficientNet"),
        ("resnetv2_50", "pre-activation"),
        ("densenet121", "DenseNet"),
    ],
)
def test_what_detectron2_cannot_hold_is_refused_by_name(
    tmp_path: Path, name: str, words: str
) -> None:
    torch.save(_timm(name), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(tmp_path / "a.pth")
    assert caught.value.kind == "unsupported"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_b_16", "Vision Transformer"),
        ("swin_t", "Swin"),
        ("regnet_x_400mf", "RegNet"),
        ("convnext_tiny", "ConvNeXt"),
        ("mobilenet_v2", "MobileNet"),
        ("mobilenet_v3_small", "MobileNet"),
        ("efficientnet_b0", "EfficientNet"),
        ("densenet121", "DenseNet"),
        ("vgg11", "VGG"),
    ],
)
def test_torchvisions_other_networks_are_refused_by_name(
    tmp_path: Path, name: str, words: str
) -> None:
    with torch.device("cpu" if "regnet" in name else "meta"):
        names = list(getattr(torchvision.models, name)(num_classes=2).state_dict())
    torch.save({key: torch.zeros(1) for key in names}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(tmp_path / "a.pth")
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv1.weight": torch.ones(8, 3, 3, 3)}, "CIFAR stem"),
        ({"conv1.weight": torch.ones(8, 1, 7, 7)}, "1-channel"),
        ({"conv1.weight": torch.ones(8, 3, 5, 5)}, "5x5"),
        ({"conv1.bias": torch.ones(8)}, "biases"),
        ({"layer1.2.conv1.weight": torch.ones(8, 8, 3, 3)}, "ResNet-20"),
    ],
)
def test_resnets_with_other_parts_are_refused_by_name(
    tmp_path: Path, change: Tensors, words: str
) -> None:
    torch.save(BODY | change, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(tmp_path / "a.pth")
    assert caught.value.kind == "unsupported"


def test_detectrons_own_caffe2_file_is_to_be_used_as_it_is(tmp_path: Path) -> None:
    torch.save({"res2_0_branch2a_w": torch.ones(1), "conv1_w": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"pass the file as MODEL\.WEIGHTS"):
        convert(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "tree",
    [{}, {"lr": 1}, linear("fc", 3, 3), [1, 2]],
    ids=["empty", "numbers", "one layer", "list"],
)
def test_a_file_without_a_resnet_says_so(tmp_path: Path, tree: Any) -> None:
    torch.save(tree, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="no ResNet|no tensors") as caught:
        convert(tmp_path / "a.pth")
    assert caught.value.kind == "unrecognised"

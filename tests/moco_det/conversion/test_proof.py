"""The proof: its own network against torchvision's, and what it must catch."""

import dataclasses

import pytest
import torch
import torchvision
from torch import Tensor

from moco_common.backbone.architecture import Architecture, detect, from_detectron2, to_detectron2
from moco_common.reader.errors import CheckpointError
from moco_det.conversion.proof import FEATURES, TOLERANCE, prove, resnet_features
from tests.moco_det.convert_cases import ARCHITECTURES, backbone, reference_conversion, state_dict

EXPECTED = {
    "resnet18": Architecture(18, 1, 64, 64, 64),
    "resnet34": Architecture(34, 1, 64, 64, 64),
    "resnet50": Architecture(50, 1, 64, 64, 256),
    "resnet101": Architecture(101, 1, 64, 64, 256),
    "resnet152": Architecture(152, 1, 64, 64, 256),
    "resnext50_32x4d": Architecture(50, 32, 4, 64, 256),
    "resnext101_32x8d": Architecture(101, 32, 8, 64, 256),
    "wide_resnet50_2": Architecture(50, 1, 128, 64, 256),
}


def _both(name: str, width: float) -> tuple[dict[str, Tensor], dict[str, Tensor], Architecture]:
    tensors = backbone(state_dict(name, width))
    return tensors, reference_conversion(tensors), detect(tensors, names={n: n for n in tensors})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_written_out_network_is_torchvisions(name: str) -> None:
    model = getattr(torchvision.models, name)()
    tensors = {k: v.clone() for k, v in backbone(model.state_dict()).items()}
    architecture = detect(tensors, names={})
    assert architecture == EXPECTED[name]
    assert architecture.shapes() == {
        k: tuple(v.shape) for k, v in tensors.items() if not k.endswith("num_batches_tracked")
    }
    images = torch.randn(2, 3, 48, 48)
    model.fc = torch.nn.Identity()
    for training in (False, True):
        with torch.no_grad():
            ours = resnet_features(tensors, architecture, images, training=training)
            expected = model.train(training)(images)
        torch.testing.assert_close(ours["res5"].mean((2, 3)), expected, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    for key in tensors:
        if "running" in key:
            torch.testing.assert_close(tensors[key], after[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "width"), [*((name, 0.25) for name in ARCHITECTURES), ("resnet18", 1)]
)
def test_the_proof_holds_for_a_hand_made_conversion(name: str, width: float) -> None:
    torchvision_names, detectron2_names, architecture = _both(name, width)
    proof = prove(torchvision_names, detectron2_names, architecture)
    assert proof.holds
    assert proof.worst < 1e-6
    assert set(proof.eval) == set(proof.train) == set(proof.statistics) == set(FEATURES)


def test_renaming_agrees_with_the_rules_by_hand_and_is_undone_by_its_inverse() -> None:
    for name in ("resnet18", "resnet50"):
        tensors = backbone(state_dict(name))
        by_hand = reference_conversion(tensors)
        assert [to_detectron2(key) for key in tensors] == list(by_hand)
        assert [from_detectron2(key) for key in by_hand] == list(tensors)


def _swap(tensors: dict[str, Tensor], a: str, b: str, leaves: tuple[str, ...]) -> None:
    for leaf in leaves:
        x, y = f"{a}.{leaf}", f"{b}.{leaf}"
        tensors[x], tensors[y] = tensors[y], tensors[x]


_ALL = ("weight", "bias", "running_mean", "running_var")


@pytest.mark.parametrize("leaves", [_ALL, ("running_mean",), ("running_var",), ("weight",)])
def test_the_proof_catches_swapped_norms(leaves: tuple[str, ...]) -> None:
    ours, theirs, architecture = _both("resnet50", 0.25)
    _swap(theirs, "res4.1.conv1.norm", "res4.1.conv2.norm", leaves)
    proof = prove(ours, theirs, architecture)
    assert not proof.holds
    assert proof.eval["res3"] <= TOLERANCE < proof.eval["res4"]


def test_the_proof_catches_statistics_swapped_in_train_mode_alone() -> None:
    ours, theirs, architecture = _both("resnet50", 0.25)
    _swap(theirs, "res5.0.conv3.norm", "res5.0.shortcut.norm", ("running_mean",))
    assert prove(ours, theirs, architecture).statistics["res5"] > TOLERANCE


def test_the_proof_catches_the_stride_in_the_wrong_convolution() -> None:
    ours, theirs, architecture = _both("resnet50", 0.25)
    other = dataclasses.replace(architecture, stride_in_1x1=True)
    proof = prove(ours, theirs, architecture, other)
    assert not proof.holds
    assert proof.eval["res2"] <= TOLERANCE < proof.eval["res3"]
    assert prove(ours, theirs, other, other).holds


def test_the_proof_catches_a_missing_running_var() -> None:
    ours, theirs, architecture = _both("resnet18", 0.25)
    del theirs["res3.0.conv1.norm.running_var"]
    with pytest.raises(CheckpointError, match=r"res3\.0\.conv1\.norm\.running_var"):
        prove(ours, theirs, architecture)


def test_the_proof_catches_a_tensor_too_many() -> None:
    ours, theirs, architecture = _both("resnet18", 0.25)
    theirs["stem.fc.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"stem\.fc\.weight"):
        prove(ours, theirs, architecture)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_proof_catches_rounding_to_half_precision(name: str) -> None:
    ours, theirs, architecture = _both(name, 0.25)
    theirs = {k: v.half().float() if v.is_floating_point() else v for k, v in theirs.items()}
    assert not prove(ours, theirs, architecture).holds


def test_the_proof_does_not_hold_for_what_is_not_a_number() -> None:
    ours, theirs, architecture = _both("resnet18", 0.25)
    for tensors, name in ((ours, "layer4.1.bn2.bias"), (theirs, "res5.1.conv2.norm.bias")):
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    assert not prove(ours, theirs, architecture).holds


def test_the_proof_changes_neither_side() -> None:
    ours, theirs, architecture = _both("resnet18", 0.25)
    before = {k: v.clone() for k, v in (ours | theirs).items()}
    prove(ours, theirs, architecture)
    assert all(torch.equal(v, before[k]) for k, v in (ours | theirs).items())

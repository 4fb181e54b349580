"""Growth divided out: the same function, in eval and in train mode, that a step turns further."""

import math
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from moco_det.conversion import (
    CheckpointError,
    convert,
    converter,
    load_detectron2_weights,
    rescale,
)
from tests.moco_det.convert_cases import backbone, state_dict
from tools.convert import main


def _grown(name: str = "resnet18", width: float = 1.0, most: float = 40.0) -> dict[str, Tensor]:
    """A network whose convolutions have grown by 0.3 to `most`, with the statistics of that."""
    tensors = backbone(state_dict(name, width))
    convolutions = [key for key, value in tensors.items() if value.dim() == 4]
    for i, key in enumerate(convolutions):
        factor = 0.3 * (most / 0.3) ** (i / (len(convolutions) - 1))
        norm = key.replace("conv", "bn").replace("downsample.0", "downsample.1")
        tensors[key] *= factor
        tensors[norm.replace("weight", "running_mean")] *= factor
        tensors[norm.replace("weight", "running_var")] *= factor**2
    return tensors


def _save(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, path)
    return path


def _network(tensors: dict[str, Tensor]) -> torch.nn.Module:
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    network.load_state_dict(tensors)
    return network


@pytest.mark.parametrize("training", [False, True])
def test_torchvisions_network_computes_the_same_from_weights_of_fresh_norms(
    tmp_path: Path, training: bool
) -> None:
    tensors = _grown()
    converted = convert(
        _save(tmp_path / "a.pth", tensors), "torchvision", rescale=True, output=tmp_path / "b.pth"
    )
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = _network(tensors).train(training)(images)
        after = _network(torch.load(tmp_path / "b.pth")).train(training)(images)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    for name, value in converted.tensors.items():
        if value.dim() == 4:
            fresh = math.sqrt(2 * value.shape[1])
            assert float(value.double().norm()) == pytest.approx(fresh, rel=1e-6)
        elif not name.endswith(("running_mean", "running_var")):
            assert torch.equal(value, tensors[name]), name


def test_detectron2s_file_holds_the_proof_and_says_what_was_done(tmp_path: Path) -> None:
    source = _save(tmp_path / "a.pth", _grown("resnet50", 0.25))
    converted = convert(source, rescale=True, output=tmp_path / "a.pkl")
    proof = converted.report.proof
    assert proof is not None
    assert proof.holds
    # Growth by 0.3 to 40 of weights that were fresh by fan-in, not by fan-out.
    largest = load_detectron2_weights(tmp_path / "a.pkl").metadata["rescaled"]  # type: ignore[index]
    assert largest == pytest.approx(max(f for f in _factors(_grown("resnet50", 0.25))), rel=1e-6)
    assert "rescaled" not in convert(source).metadata


def _factors(tensors: dict[str, Tensor]) -> list[float]:
    return [float(t.norm()) / math.sqrt(2 * t.shape[1]) for t in tensors.values() if t.dim() == 4]


def test_one_step_turns_a_grown_layer_less_by_the_square_of_the_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 12, 12, generator=generator)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    mix = torch.randn(8, 4, 10, 10, generator=generator)

    def turned(weight: Tensor) -> float:
        w = weight.clone().requires_grad_()
        (F.batch_norm(F.conv2d(x, w), None, None, training=True, eps=1e-12) * mix).sum().backward()
        assert w.grad is not None
        step = w.detach() - 1e-5 * w.grad
        cosine = F.cosine_similarity(w.detach().double().flatten(), step.double().flatten(), dim=0)
        return float(torch.arccos(cosine.clamp(max=1)))

    assert turned(weight) / turned(10 * weight) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("wrong", ["weight", "running_mean", "running_var"])
def test_the_proof_catches_statistics_that_were_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def forgetful(tensors, architecture, by):  # type: ignore[no-untyped-def]
        done = rescale.divide(tensors, architecture, by)
        return {k: tensors[k] if k.endswith(wrong) else v for k, v in done.items()}

    monkeypatch.setattr(converter, "divide", forgetful)
    with pytest.raises(CheckpointError, match="differs from the source"):
        convert(_save(tmp_path / "a.pth", _grown()), rescale=True, output=tmp_path / "b.pkl")
    assert not (tmp_path / "b.pkl").exists()


def test_a_network_whose_norms_would_feel_the_eps_is_refused(tmp_path: Path) -> None:
    tensors = _grown(most=5.0)
    for name in ("layer1.0.conv1.weight", "layer1.0.bn1.running_mean"):
        tensors[name] *= 1e4
    tensors["layer1.0.bn1.running_var"].fill_(1.0)  # tiny beside the weights: 1e-9 when divided
    with pytest.raises(CheckpointError, match="because the eps of the norms"):
        convert(_save(tmp_path / "a.pth", tensors), rescale=True, output=tmp_path / "b.pkl")
    assert not (tmp_path / "b.pkl").exists()


def test_growth_is_said_where_it_will_be_felt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = backbone(state_dict("resnet18", 1.0))
    source = _save(tmp_path / "a.pth", tensors)
    assert main([str(source), "-o", str(tmp_path / "a.pkl")]) == 0
    assert "fresh" not in capsys.readouterr().out
    tensors["conv1.weight"] *= 30 * math.sqrt(6) / tensors["conv1.weight"].norm()
    _save(source, tensors)
    assert main([str(source), "-o", str(tmp_path / "a.pkl")]) == 0
    assert "conv1 has grown to 30 times the norm of a fresh layer" in capsys.readouterr().out
    assert main([str(source), "-o", str(tmp_path / "a.pkl"), "--rescale"]) == 0
    assert "conv1 had grown most, to 30.0 times that" in capsys.readouterr().out


def test_layers_without_a_norm_to_speak_of_are_left_alone(tmp_path: Path) -> None:
    tensors = backbone(state_dict("resnet18", 1.0))
    tensors["layer1.0.conv1.weight"].zero_()
    tensors["layer1.0.conv2.weight"][0, 0, 0, 0] = math.inf
    converted = convert(
        _save(tmp_path / "a.pth", tensors), "torchvision", rescale=True, proof=False
    )
    for name in ("layer1.0.conv1.weight", "layer1.0.conv2.weight"):
        assert torch.equal(converted.tensors[name], tensors[name])

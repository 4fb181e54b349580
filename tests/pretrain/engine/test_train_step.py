"""The step against plain SGD, and its precisions and compilation against float32."""

import copy
import os

import pytest
import torch
from torch import nn

from moco_common import comm
from moco_common.errors import UserError
from pretrain.engine.train_step import TrainStep
from pretrain.methods.moco import MoCo
from pretrain.modeling.heads import linear_head, mlp_head
from pretrain.modeling.resnet import ResNet

BATCH, STEPS, LR = 16, 5, 0.01


class Stem(ResNet):
    """A ResNet's first convolution and its head: twenty BN layers of a small batch would amplify
    rounding too much to compare precisions."""

    def __init__(self):
        super().__init__(18, width=1 / 16)
        self.layer1 = self.layer2 = self.layer3 = self.layer4 = nn.Identity()
        self.fc = linear_head(8)(4)


def small():
    return ResNet(18, width=1 / 16, head=mlp_head(8))


float16_on_a_cpu = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="before torch 2.3 no float16 on a CPU"
)
FLOAT16 = pytest.param("float16", marks=float16_on_a_cpu)


def make(build=small, **kwargs):
    torch.manual_seed(0)
    method = MoCo(build, dim=8, queue_size=21, momentum=0.9, temperature=0.5)
    method = method.to(memory_format=torch.channels_last)
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=1e-3)
    return TrainStep(method, optimizer, total_steps=STEPS, **kwargs)


def views(step):
    """Of this rank: two (BATCH, 3, 64, 64) uint8 views that share a coarse pattern."""
    generator = torch.Generator().manual_seed(100 * comm.rank() + step)
    pattern = 255 * torch.rand(BATCH, 3, 4, 4, generator=generator).repeat_interleave(16, 2)
    pattern = pattern.repeat_interleave(16, 3)
    noise = 40 * torch.randn(2, *pattern.shape, generator=generator)
    return list((pattern + noise).clamp(0, 255).to(torch.uint8))


def run(take_step, start=0, stop=STEPS):
    index = torch.arange(BATCH)
    return torch.stack(
        [take_step(views(step), index, step, LR)["loss"] for step in range(start, stop)]
    )


def distance(a, b, build):
    """Between the parameters of two methods, as a share of how far the second one has moved."""
    start, a, b = (
        torch.cat([p.detach().flatten() for p in method.encoder_q.parameters()])
        for method in (make(build).method, a, b)
    )
    return ((a - b).norm() / (b - start).norm()).item()


def test_a_step_is_forward_backward_and_sgd_at_the_learning_rate_given():
    take_step = make()
    plain = copy.deepcopy(take_step.method)
    velocity = {}
    for step in range(STEPS):
        loss = plain(views(step), step, torch.arange(BATCH))["loss"]
        plain.zero_grad()
        loss.backward()
        for name, p in plain.encoder_q.named_parameters():
            gradient = p.grad + 1e-3 * p.detach()
            velocity[name] = gradient + 0.9 * velocity.get(name, 0.0)
            p.data -= LR * velocity[name]
        outputs = take_step(views(step), torch.arange(BATCH), step, LR)
        torch.testing.assert_close(outputs["loss"], loss.detach())
        assert not outputs["loss"].requires_grad
    torch.testing.assert_close(take_step.method.state_dict(), plain.state_dict())


def test_a_method_is_called_before_and_after_the_update(monkeypatch):
    take_step = make()
    weight = take_step.method.encoder_q.conv1.weight
    calls = []

    def before(step):
        calls.append(("before", step, weight.detach().clone(), weight.grad.clone()))
        weight.grad.zero_()

    def after(step, total):
        calls.append(("after", step, total, weight.detach().clone()))

    monkeypatch.setattr(take_step.method, "before_update", before)
    monkeypatch.setattr(take_step.method, "after_update", after)
    run(take_step, 0, 1)
    (_, step, old, gradient), (_, also_step, total, new) = calls
    assert (step, also_step, total) == (0, 0, STEPS)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(
        new, old * (1 - LR * 1e-3)
    )  # weight decay alone: the rest was zeroed


@pytest.mark.parametrize("precision", ["bfloat16", FLOAT16])
def test_reduced_precision_trains_as_float32_does(precision):
    dtype = getattr(torch, precision)
    full, reduced = make(Stem), make(Stem, precision=precision)
    if precision == "float16":  # past the first steps, in which a scaler finds its scale
        reduced.scaler.load_state_dict(reduced.scaler.state_dict() | {"scale": 256.0})
    seen = set()
    for name in ("encoder_q", "encoder_k"):
        encoder = getattr(reduced.method, name)
        encoder.conv1.register_forward_hook(
            lambda _module, _input, output, name=name: seen.add((name, "inside", output.dtype))
        )
        encoder.register_forward_hook(
            lambda _module, _input, output, name=name: seen.add((name, "outside", output.dtype))
        )
    expected, losses = run(full), run(reduced)
    assert seen == {
        (name, place, kind)
        for name in ("encoder_q", "encoder_k")
        for place, kind in (("inside", dtype), ("outside", torch.float32))
    }
    assert {v.dtype for v in reduced.method.state_dict().values() if v.is_floating_point()} == {
        torch.float32
    }
    assert not torch.equal(losses, expected)
    torch.testing.assert_close(losses, expected, rtol=5e-4, atol=0.0)
    assert distance(reduced.method, full.method, Stem) < 0.02


@float16_on_a_cpu
def test_float16_scales_the_loss_and_shows_methods_true_gradients(monkeypatch):
    full, scaled = make(), make(precision="float16")
    scaled.scaler.load_state_dict(scaled.scaler.state_dict() | {"scale": 1024.0})
    norms = []
    for take_step in (full, scaled):
        weight = take_step.method.encoder_q.fc[0].weight
        monkeypatch.setattr(
            take_step.method, "before_update", lambda _, w=weight: norms.append(w.grad.norm())
        )
        run(take_step, 0, 1)
    torch.testing.assert_close(norms[1], norms[0], rtol=0.05, atol=0.0)


@float16_on_a_cpu
def test_overflowing_gradients_leave_the_parameters_and_lower_the_scale():
    take_step = make(precision="float16")
    take_step.scaler.load_state_dict(take_step.scaler.state_dict() | {"scale": 2.0**40})
    before = copy.deepcopy(take_step.method.encoder_q.state_dict())
    loss = run(take_step, 0, 1)
    assert torch.isfinite(loss).all()
    for name, p in take_step.method.encoder_q.named_parameters():
        assert torch.equal(p, before[name]), name
    assert take_step.state_dict()["scaler"]["scale"] == 2.0**39


@pytest.mark.parametrize("precision", ["float32", FLOAT16])
def test_a_resumed_step_goes_on_exactly(precision, tmp_path):
    whole = make(precision=precision)
    losses = run(whole)
    first, second = make(precision=precision), make(precision=precision)
    run(first, 0, 2)
    torch.save({"method": first.method.state_dict(), **first.state_dict()}, tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    assert ("scaler" in state) == (precision == "float16")
    second.method.load_state_dict(state["method"])
    second.load_state_dict(state)
    assert torch.equal(run(second, 2), losses[2:])
    torch.testing.assert_close(
        second.method.state_dict(), whole.method.state_dict(), rtol=0.0, atol=0.0
    )


@float16_on_a_cpu
def test_a_float32_checkpoint_goes_on_in_float16_with_a_new_scaler():
    full, reduced = make(), make(precision="float16")
    run(full, 0, 2)
    reduced.load_state_dict(full.state_dict())
    assert reduced.state_dict()["scaler"]["scale"] == 2.0**16


def test_compiled_encoders_train_as_ordinary_ones(monkeypatch):
    # Traced and differentiated as ever, but not made into C++, which takes a minute: that is
    # soak_compile.py's part.
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile(module, backend="aot_eager"))
    plain, compiled = make(Stem), make(Stem, compile=True)
    torch.testing.assert_close(run(compiled), run(plain), rtol=1e-4, atol=0.0)
    assert list(compiled.method.state_dict()) == list(plain.method.state_dict())
    assert distance(compiled.method, plain.method, Stem) < 1e-3
    for name in ("encoder_q.bn1.running_var", "encoder_k.bn1.num_batches_tracked"):
        ours, theirs = (m.method.state_dict()[name] for m in (compiled, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_impossible_precision_or_compilation_is_one_sentence(monkeypatch):
    with pytest.raises(UserError, match="SOLVER.PRECISION is 'half': choose one of float32"):
        make(precision="half")
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="SOLVER.COMPILE needs a C"):
        make(compile=True)
    monkeypatch.delattr(torch.amp, "GradScaler", raising=False)  # before 2.3 there is none
    with pytest.raises(UserError, match="float16 needs a GPU or torch 2.3"):
        make(precision="float16")

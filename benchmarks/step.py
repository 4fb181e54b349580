"""Time of a MoCo v2 step, its loss and its momentum update, compared with a straightforward one.

    python benchmarks/step.py [--quick] [--no-compile] [--batch 16] [--size 224]

The peer in this file is the usual translation of the paper's pseudo-code: contiguous tensors, a
Python loop over the parameters for the momentum update, a cloned queue, concatenated logits, a
materialised softmax. Both start from the same weights and see the same images; losses, keys and
parameters are compared first. They take turns within each round; medians are reported.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.turns import take_turns
from pretrain.engine.train_step import TrainStep
from pretrain.losses import info_nce
from pretrain.methods.moco import MoCo
from pretrain.modeling.heads import mlp_head
from pretrain.modeling.resnet import ResNet
from pretrain.profiling import StageClock

KEYS, DIM, TEMPERATURE, MOMENTUM = 65536, 128, 0.2, 0.999


def plain_info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Return the loss and the queries that find their key, from a CxK queue and all logits."""
    positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)  # Nx1
    negative = torch.einsum("nc,ck->nk", [q, queue.clone().detach()])  # NxK
    logits = torch.cat([positive, negative], dim=1) / temperature  # Nx(1+K)
    labels = torch.zeros(len(q), dtype=torch.long)
    return F.cross_entropy(logits, labels), logits.argmax(1) == 0


@torch.no_grad()
def plain_momentum_update(key: nn.Module, query: nn.Module, momentum: float) -> None:
    for p_k, p_q in zip(key.parameters(), query.parameters(), strict=True):
        p_k.data = p_k.data * momentum + p_q.data * (1.0 - momentum)


class PlainStep:
    """A whole step that uses nothing of this project but the network and the permutation."""

    def __init__(self, method: MoCo, lr: float) -> None:
        self.encoder_q = copy.deepcopy(method.encoder_q).to(memory_format=torch.contiguous_format)
        self.encoder_k = copy.deepcopy(method.encoder_k).to(memory_format=torch.contiguous_format)
        self.queue, self.pointer = method.queue.T.contiguous(), 0
        self.optimizer = sgd(self.encoder_q, lr)

    def __call__(self, views: Sequence[Tensor], step: int) -> Tensor:
        q = F.normalize(self.encoder_q(views[0]), dim=1)
        with torch.no_grad():
            plain_momentum_update(self.encoder_k, self.encoder_q, MOMENTUM)
            order = torch.randperm(len(q), generator=torch.Generator().manual_seed(step))
            k = F.normalize(self.encoder_k(views[1][order]), dim=1)[order.argsort()]
        loss, _ = plain_info_nce(q, k, self.queue, TEMPERATURE)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.queue[:, self.pointer : self.pointer + len(k)] = k.T
        self.pointer = (self.pointer + len(k)) % self.queue.shape[1]
        return loss.detach()


def sgd(module: nn.Module, lr: float) -> torch.optim.SGD:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each call; the calls take turns in each round."""
    times = take_turns(calls, rounds)
    for name, values in times.items():
        print(
            f"  {name:24s} {statistics.median(values):9.2f} ms"
            f"  ({min(values):.2f} to {max(values):.2f}, n = {rounds})",
            flush=True,
        )
    return {name: statistics.median(values) for name, values in times.items()}


def bench_info_nce(rows: int, rounds: int) -> float:
    generator = torch.Generator().manual_seed(0)
    q, k, negatives = (
        F.normalize(torch.randn(n, DIM, generator=generator), dim=1) for n in (rows, rows, KEYS)
    )
    q.requires_grad_()
    transposed = negatives.T.contiguous()

    def run(loss_of: Callable, queue: Tensor) -> tuple[Tensor, ...]:
        q.grad = None
        loss, correct = loss_of(q, k, queue, TEMPERATURE)
        loss.backward()
        return loss.detach(), correct, q.grad

    ours, plain = partial(run, info_nce, negatives), partial(run, plain_info_nce, transposed)
    for a, b in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    print(f"InfoNCE, forward and backward, {rows} x {KEYS} keys of {DIM}")
    times = medians({"straightforward": plain, "ours": ours}, rounds)
    return times["straightforward"] / times["ours"]


def bench_ema(method: MoCo, rounds: int) -> float:
    plain = copy.deepcopy(method)
    method.update_key_encoder()
    plain_momentum_update(plain.encoder_k, plain.encoder_q, MOMENTUM)
    for a, b in zip(method.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    print(f"momentum update, {len(list(method.encoder_k.parameters()))} tensors")
    calls = {
        "straightforward": partial(
            plain_momentum_update, plain.encoder_k, plain.encoder_q, MOMENTUM
        ),
        "ours": method.update_key_encoder,
    }
    times = medians(calls, rounds)
    return times["straightforward"] / times["ours"]


def build(compile: bool) -> tuple[MoCo, TrainStep]:
    torch.manual_seed(0)
    method = MoCo(
        partial(ResNet, 50, head=mlp_head(DIM)),
        dim=DIM,
        queue_size=KEYS,
        momentum=MOMENTUM,
        temperature=TEMPERATURE,
    ).to(memory_format=torch.channels_last)
    return method, TrainStep(method, sgd(method, 0.03), total_steps=1, compile=compile)


def bench_step(rounds: int, batch: int, size: int, compile: bool) -> dict[str, float]:
    assert_same_maths()
    generator = torch.Generator().manual_seed(1)
    views = [
        torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
        for _ in range(2)
    ]
    method, step = build(False)
    plain = PlainStep(method, lr=0.03)
    calls: dict[str, Callable[[], object]] = {
        "straightforward": lambda: plain(views, 0),
        "ours": lambda: step(views, torch.arange(batch), 0, 0.03)["loss"],
    }
    if compile:
        compiled = build(True)[1]
        calls["ours, compiled"] = lambda: compiled(views, torch.arange(batch), 0, 0.03)["loss"]
    losses = {name: call() for name, call in calls.items()}  # also compiles
    for name, loss in losses.items():
        torch.testing.assert_close(loss, losses["straightforward"], rtol=1e-3, atol=0.0, msg=name)
    print(f"step of ResNet-50, batch {batch}, {size} px, {torch.get_num_threads()} threads")
    times = medians(calls, rounds)
    with StageClock() as clock:
        calls["ours"]()
    print(clock.table(1))
    print(f"  outside the encoders: {1 - clock.share('encoders'):.2%} of the step")
    return {name: times["straightforward"] / value for name, value in times.items()}


def assert_same_maths(lr: float = 0.03) -> None:
    """Check that two steps in float64 give the same losses, keys and parameters, to 1e-5.

    In float32, fifty layers of BN amplify the different rounding of the memory formats beyond that.
    """
    generator = torch.Generator().manual_seed(2)
    views = torch.randn(2, 4, 3, 64, 64, generator=generator, dtype=torch.float64).unbind()
    method, _ = build(False)
    method.double()
    step = TrainStep(method, sgd(method, lr), total_steps=2)
    plain = PlainStep(method, lr)
    for _ in range(2):
        loss = step(views, torch.arange(4), 0, lr)["loss"]
        torch.testing.assert_close(loss, plain(views, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(method.queue, plain.queue.T, rtol=1e-5, atol=1e-5)
    for ours, theirs in ((method.encoder_q, plain.encoder_q), (method.encoder_k, plain.encoder_k)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    print("two steps in float64: losses, queue and parameters equal to 1e-5")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds of the step, not seven")
    parser.add_argument("--no-compile", action="store_true", help="skip the compiled step")
    parser.add_argument("--no-step", action="store_true", help="time only the loss and the update")
    parser.add_argument("--batch", type=int, default=16, help="images per step (16)")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels (224)")
    args = parser.parse_args(argv)
    few, many = (2, 7) if args.quick else (7, 31)

    ratios = {f"info_nce_{rows}": bench_info_nce(rows, many) for rows in (32, 256)}
    ratios["info_nce"] = min(ratios.values())
    ratios["ema"] = bench_ema(build(False)[0], many)
    if not args.no_step:
        steps = bench_step(few, args.batch, args.size, not args.no_compile)
        ratios["step_r50"] = steps["ours"]
        if not args.no_compile:
            ratios["step_r50_compiled"] = steps["ours, compiled"]
    for name, value in ratios.items():
        print(f"ratio {name} {value:.2f}")


if __name__ == "__main__":
    main()

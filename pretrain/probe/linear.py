"""Linear classification of frozen features: the paper's protocol, and a quick approximation.

Source: He et al. 2020, section 4.1, "Linear Classification Protocol": a supervised linear
classifier on the features after global average pooling, trained for 100 epochs with an initial
learning rate of 30 and weight decay 0 (found there by a grid search). Batch size 256 and the decay
by 0.1 at epochs 60 and 80 are those of the paper's code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_common.errors import UserError
from moco_common.progress import Loop
from pretrain.data.loader import build_batches
from pretrain.data.transforms.recipes import ViewRecipe
from pretrain.modeling.resnet import ResNet
from pretrain.probe.backbone import frozen
from pretrain.probe.datasets import LabelledImages, stratified_split
from pretrain.probe.defaults import RATES
from pretrain.probe.features import Features, Say
from pretrain.solver import schedules

IN_MEMORY = 2**27  # largest number of standardised floats kept in memory between gradients
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class LinearProtocol:
    """The linear protocol; the defaults are the paper's.

    Attributes:
        rates: learning rates; one classifier is trained with each, all on the same batches.
        epochs: number of epochs.
        batch_size: images per step.
        milestones, gamma: the learning rate is multiplied by gamma at these shares of the run.
        momentum, weight_decay: parameters of SGD.
        min_scale: smallest area of a random crop, as a share of the image.
    """

    rates: Sequence[float] = RATES
    epochs: float = 100
    batch_size: int = 256
    milestones: Sequence[float] = (0.6, 0.8)
    gamma: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    min_scale: float = 0.08

    def rate(self, base: float, step: int, total: int) -> float:
        """Return the learning rate of a step in [0, total)."""
        return schedules.learning_rate(
            step,
            total,
            base=base,
            schedule="step",
            milestones=self.milestones,
            gamma=self.gamma,
        )


def train_linear(
    backbone: ResNet,
    images: LabelledImages,
    protocol: LinearProtocol,
    *,
    crop_size: int,
    seed: int = 0,
    workers: int = 0,
    say: Say = print,
) -> list[nn.Linear]:
    """Train one classifier per learning rate on random resized crops, flipped at random.

    The backbone runs in evaluation mode and without gradients, and is checked to be unchanged.

    Args:
        workers: number of decoding processes; the classifiers are bit-for-bit the same for any.

    Returns:
        One ``Linear(C, classes)`` for each of ``protocol.rates``, on the backbone's device.

    Raises:
        UserError: a learning rate is not positive, or too many images cannot be read.
        RuntimeError: the backbone changed during the training.
    """
    if not protocol.rates or min(protocol.rates) <= 0:
        raise UserError(f"--lr is {list(protocol.rates)}: give rates above 0, such as 30.")
    device = next(backbone.parameters()).device
    total = math.ceil(protocol.epochs * len(images) / protocol.batch_size)
    heads = [
        head.to(device)
        for head in _classifiers(
            backbone.num_features, len(images.classes), len(protocol.rates), seed
        )
    ]
    optimizer = torch.optim.SGD(
        [{"params": head.parameters()} for head in heads],
        lr=protocol.rates[0],
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
    )
    view = ViewRecipe(crop_size=crop_size, scale=(protocol.min_scale, 1.0))
    labels = torch.from_numpy(images.labels)
    with frozen(backbone):
        batches = build_batches(
            images,
            [view],
            batch_size=protocol.batch_size,
            seed=seed,
            stop_step=total,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            reduce=False,
        )
        chance = math.log(len(images.classes))
        means = torch.zeros(len(heads), device=device)  # of the last losses, decaying
        with Loop("linear", total, say) as loop:
            for step, batch in enumerate(batches):
                with torch.no_grad():
                    features = backbone.forward_features(batch.to(device)[0])  # NxC
                target = labels[batch.index].to(device)
                # Each loss depends on its own classifier only, so one step trains all of them.
                losses = [F.cross_entropy(head(features), target) for head in heads]
                means = 0.9 * means + 0.1 * torch.stack(losses).detach()
                optimizer.zero_grad(set_to_none=True)
                torch.stack(losses).sum().backward()
                for group, base in zip(optimizer.param_groups, protocol.rates, strict=True):
                    group["lr"] = protocol.rate(base, step, total)
                optimizer.step()
                if loop.at(step + 1):
                    epoch = (step + 1) * protocol.batch_size / len(images)
                    text = " ".join(f"{loss.item():.3f}" for loss in losses)
                    loop.tell(f"epoch {epoch:.1f}/{protocol.epochs:g}  loss {text}")
    ends = dict(zip(protocol.rates, means.tolist(), strict=True))
    diverged = {rate: loss for rate, loss in ends.items() if not loss <= chance}  # nan too
    if diverged:
        which = ", ".join(f"{rate:g} (loss {loss:.3g})" for rate, loss in diverged.items())
        advice = "" if len(diverged) < len(ends) else "; pass lower rates with --lr"
        say(
            f"warning: the training diverged at the learning rate {which}, above the loss of "
            f"chance ({chance:.3g}), and its accuracy says little about the features{advice}"
        )
    return heads


def _classifiers(features: int, classes: int, count: int, seed: int) -> list[nn.Linear]:
    """Return classifiers with the same weights from N(0, 0.01) and zero biases, as in the paper."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, features, generator=generator) * 0.01
    heads = []
    for _ in range(count):
        head = nn.utils.skip_init(nn.Linear, features, classes)
        nn.init.zeros_(head.bias)
        head.weight.data.copy_(weight)
        heads.append(head)
    return heads


@torch.no_grad()
def rank_classes(
    classifier: nn.Linear, features: Tensor, *, top: int = 5, chunk: int = 8192
) -> Tensor:
    """Rank the classes by logit: int64 (M, min(top, classes)), on the CPU."""
    device = classifier.weight.device
    top = min(top, classifier.out_features)
    return torch.cat(
        [classifier(x.to(device)).topk(top, dim=1)[1].cpu() for x in features.split(chunk)]
    )


def quick_linear(
    train: Features, *, device: torch.device | None = None, seed: int = 0, say: Say = print
) -> tuple[nn.Linear, float]:
    """Fit logistic regression to standardised stored features by L-BFGS, in seconds.

    The penalty is chosen from `PENALTIES` on a held-out fifth of the training images, stratified by
    class; the test images are not used. Unlike the paper's protocol, this uses no random crops, so
    its accuracies are close to the protocol's but not equal.

    Returns:
        The classifier of unstandardised features (the standardisation is folded into its weights),
        and the penalty.
    """
    kept, held = stratified_split(train.labels.numpy(), 0.2, seed)
    inner, outer = train.pick(torch.from_numpy(kept)), train.pick(torch.from_numpy(held))
    best = (-1.0, PENALTIES[0])
    start = None
    for penalty in PENALTIES:  # from strong to weak, each started from the previous solution
        start = logistic_regression(inner, penalty, start=start, device=device)
        right = (rank_classes(start, outer.values, top=1)[:, 0] == outer.labels).float().mean()
        say(f"quick linear: penalty {penalty:g}  held-out top-1 {100 * right.item():.2f} %")
        best = max(best, (right.item(), penalty))  # the stronger penalty in a tie
    return logistic_regression(train, best[1], device=device), best[1]


@torch.no_grad()
def logistic_regression(
    train: Features,
    penalty: float,
    *,
    start: nn.Linear | None = None,
    device: torch.device | None = None,
    max_iter: int = 100,
    chunk: int = 65536,
) -> nn.Linear:
    """Fit logistic regression to standardised features by L-BFGS.

    Minimises mean cross-entropy + penalty/2 |W|^2 over weights W and unpenalised biases, with exact
    gradients over all images.

    Args:
        start: initial classifier; default: zero.

    Returns:
        A ``Linear`` for unstandardised features.
    """
    device = device or torch.device("cpu")
    x, y = train.values, train.labels
    mean, scale = _moments(x, chunk)
    mean, scale = mean.to(device), scale.to(device)
    classes = len(train.classes)
    weight = torch.zeros(classes, x.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    if start is not None:
        weight.copy_(start.weight / scale)
        bias.copy_(start.bias + start.weight @ mean)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, labels in zip(x.split(chunk), y.split(chunk), strict=True):
            yield (rows.to(device) - mean) * scale, labels.to(device)

    kept = list(parts()) if x.numel() <= IN_MEMORY else None

    def closure() -> Tensor:
        loss = 0.5 * penalty * weight.square().sum()
        gradient, shift = penalty * weight, torch.zeros_like(bias)
        for inputs, target in parts() if kept is None else kept:  # NxC, N
            logits = inputs @ weight.T + bias  # NxK
            loss = loss + F.cross_entropy(logits, target, reduction="sum") / len(x)
            error = (logits.softmax(1) - F.one_hot(target, classes)) / len(x)  # NxK
            gradient = gradient + error.T @ inputs
            shift += error.sum(0)
        weight.grad, bias.grad = gradient, shift
        return loss

    optimizer.step(closure)
    result: nn.Linear = nn.utils.skip_init(nn.Linear, x.shape[1], classes, device=device)
    result.weight.copy_(weight * scale)
    result.bias.copy_(bias - (weight * scale) @ mean)
    return result.requires_grad_(False)


def _moments(x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the inverse standard deviation of each column (1 if it is constant)."""
    mean = torch.stack([part.double().sum(0) for part in x.split(chunk)]).sum(0) / len(x)
    parts = [(part.double() - mean).square().sum(0) for part in x.split(chunk)]
    std = (torch.stack(parts).sum(0) / len(x)).sqrt()
    return mean.float(), torch.where(std > 1e-6, 1 / std, 1.0).float()

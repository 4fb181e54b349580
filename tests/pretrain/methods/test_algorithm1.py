"""Twenty steps of MoCo against Algorithm 1 of He et al. 2020, written out naively.

The oracle imagines four GPUs: each has a network of its own, made of torch's plain layers, whose BN
sees that GPU's four images only. Images and keys are moved by lists of row numbers, all logits are
made, the queue is a concatenation, gradients are averaged and SGD is written out. The package's
step must come to the same, whether four, two or one process stand for the four GPUs.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco_common import comm
from pretrain import distributed
from pretrain.engine.train_step import TrainStep
from pretrain.methods.moco import MoCo
from pretrain.modeling.batch_norm import SplitBatchNorm2d
from tests.pretrain.ranks import on_ranks

STEPS, GPUS, BATCH, KEYS, DIM = 20, 4, 16, 23, 6  # 23: no batch ends where the queue does
LR, SGD_MOMENTUM, DECAY = 0.05, 0.9, 1e-2
TEMPERATURE, MOMENTUM, SEED = 0.2, 0.9, 5


class Pixels(nn.Module):
    """Bytes to numbers; the package moves bytes between processes."""

    def forward(self, images):
        return images.double() / 128 - 1


def network(norm):
    torch.manual_seed(1)
    return nn.Sequential(
        Pixels(),
        nn.Conv2d(3, 5, 3, stride=2, bias=False),
        norm(5),
        nn.ReLU(),
        nn.Conv2d(5, 7, 3, bias=False),
        norm(7),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, DIM),
    ).double()


def images(step):
    """Two views of the global batch, bytes: images of different brightness, so that BN tells which
    of them were together."""
    generator = torch.Generator().manual_seed(step)
    shape = (2, BATCH, 3, 11, 11)
    light = torch.rand(1, BATCH, 3, 1, 1, generator=generator)
    return (255 * light * torch.rand(shape, generator=generator)).to(torch.uint8)


def permutation(step):
    """Which global row stands at each place; the only thing taken from the package's promise."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    return torch.randperm(BATCH, generator=generator).tolist()


def initial_queue():
    noise = torch.randn(KEYS, DIM, generator=torch.Generator().manual_seed(SEED))
    return F.normalize(noise, dim=1).double()


@functools.cache
def algorithm_1():
    f_q = [network(nn.BatchNorm2d) for _ in range(GPUS)]
    f_k = [network(nn.BatchNorm2d) for _ in range(GPUS)]
    queue, pointer = initial_queue(), 0
    velocity = [torch.zeros_like(p) for p in f_q[0].parameters()]
    size = BATCH // GPUS
    losses, all_logits = [], []
    for step in range(STEPS):
        x_q, x_k = images(step)
        q = [F.normalize(f_q[gpu](x_q[gpu * size : gpu * size + size])) for gpu in range(GPUS)]

        for gpu in range(GPUS):
            for p_k, p_q in zip(f_k[gpu].parameters(), f_q[gpu].parameters(), strict=True):
                p_k.data = MOMENTUM * p_k.data + (1 - MOMENTUM) * p_q.data

        order = permutation(step)
        k = [None] * BATCH
        for gpu in range(GPUS):
            rows = order[gpu * size : gpu * size + size]
            with torch.no_grad():
                keys = F.normalize(f_k[gpu](torch.stack([x_k[row] for row in rows])))
            for row, key in zip(rows, keys, strict=True):
                k[row] = key

        gradients = [torch.zeros_like(p) for p in velocity]
        mean_loss = 0.0
        for gpu in range(GPUS):
            own = torch.stack(k[gpu * size : gpu * size + size])
            positive = torch.bmm(q[gpu].view(size, 1, DIM), own.view(size, DIM, 1)).view(size, 1)
            negative = torch.mm(q[gpu], queue.T)
            logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
            loss = nn.CrossEntropyLoss()(logits, torch.zeros(size, dtype=torch.long))
            own_gradients = torch.autograd.grad(loss, list(f_q[gpu].parameters()))
            for total, part in zip(gradients, own_gradients, strict=True):
                total += part / GPUS
            mean_loss += loss.item() / GPUS
            all_logits.append(logits.detach())
        losses.append(mean_loss)

        for i, (speed, gradient) in enumerate(zip(velocity, gradients, strict=True)):
            weight = list(f_q[0].parameters())[i].data.clone()
            speed.copy_(SGD_MOMENTUM * speed + gradient + DECAY * weight)
            for gpu in range(GPUS):
                list(f_q[gpu].parameters())[i].data = weight - LR * speed

        queue = torch.cat([queue, torch.stack(k)])[-KEYS:]
        pointer = (pointer + BATCH) % KEYS
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "logits": torch.cat(all_logits).view(STEPS, BATCH, 1 + KEYS),
        "queue": queue,
        "pointer": pointer,
        "encoder_q": mean_state(f_q),
        "encoder_k": mean_state(f_k),
    }


def mean_state(networks):
    """Parameters (equal on all GPUs) and BN statistics (their mean, as checkpoints hold it)."""
    states = [net.state_dict() for net in networks]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]
    }


def ours():
    """The same by the package, on this rank's share of the images."""
    world, rank = comm.world_size(), comm.rank()
    share = BATCH // world
    mine = slice(rank * share, rank * share + share)
    norm = functools.partial(SplitBatchNorm2d, groups=GPUS // world)
    method = MoCo(
        functools.partial(network, norm),
        dim=DIM,
        queue_size=KEYS,
        momentum=MOMENTUM,
        temperature=TEMPERATURE,
        seed=SEED,
    ).double()
    method.queue.copy_(initial_queue())
    optimizer = torch.optim.SGD(
        method.encoder_q.parameters(), lr=1.0, momentum=SGD_MOMENTUM, weight_decay=DECAY
    )
    take_step = TrainStep(method, optimizer, total_steps=STEPS)
    queries = []
    method.encoder_q.register_forward_hook(lambda *call: queries.append(call[-1].detach()))
    losses, logits = [], []
    for step in range(STEPS):
        oldest_first = method.queue.roll(-int(method.queue_ptr), 0)
        outputs = take_step(images(step)[:, mine].unbind(), torch.arange(share), step, LR)
        losses.append(outputs["loss"])
        q = F.normalize(queries[step], dim=1)
        k = method.queue.roll(-int(method.queue_ptr), 0)[-BATCH:][mine]
        products = [(q * k).sum(1, keepdim=True), q @ oldest_first.T]
        logits.append(torch.cat(products, dim=1) / TEMPERATURE)
    losses = torch.stack(losses)
    distributed.all_reduce_mean([losses])
    distributed.average_batch_norm(method)
    return {
        "losses": losses,
        "logits": torch.stack(logits),
        "queue": method.queue.roll(-int(method.queue_ptr), 0),
        "pointer": int(method.queue_ptr),
        "encoder_q": method.encoder_q.state_dict(),
        "encoder_k": method.encoder_k.state_dict(),
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_twenty_steps_equal_algorithm_1_on_four_gpus(world):
    expected = algorithm_1()
    assert expected["losses"].std() > 0.01  # the run goes somewhere
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    for rank, result in enumerate(on_ranks(world, ours)):
        share = BATCH // world
        close(result["losses"], expected["losses"])
        close(result["logits"], expected["logits"][:, rank * share : rank * share + share])
        close(result["queue"], expected["queue"])
        assert result["pointer"] == expected["pointer"] == STEPS * BATCH % KEYS
        for encoder in ("encoder_q", "encoder_k"):
            assert result[encoder].keys() == expected[encoder].keys()
            for name, value in expected[encoder].items():
                close(result[encoder][name].double(), value, msg=f"{encoder}.{name}")

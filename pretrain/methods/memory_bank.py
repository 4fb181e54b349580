"""The memory bank (Wu et al. 2018) in MoCo's comparison (He et al. 2020, Figure 2b): one stored key
per image, updated when the image is seen. Head and temperature are those of ``MOCO``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from moco_common import comm
from moco_common.errors import UserError
from pretrain import distributed
from pretrain.losses import log_sum_exp, noise_rejected
from pretrain.methods.base import Memory, Method, Run
from pretrain.methods.components import (
    contrastive_head,
    embedding_spread,
    encoder_builder,
    positive_temperature,
    shared_generator,
    unit,
)
from pretrain.modeling.resnet import ResNet

SHARED = ("MOCO",)
KEYS = {
    "BANK.NEGATIVES": (
        65536,
        "Number of negatives drawn at each step, K. At most the number of images minus the batch.",
    ),
    "BANK.MOMENTUM": (
        0.5,
        "Momentum of a stored key, m: an updated key is m old + (1 - m) new, normalised.",
    ),
    "BANK.LOSS": (
        "softmax",
        "Loss: softmax (InfoNCE over the key and its negatives), or nce (Wu et al. 2018: a binary "
        "decision for each, with a constant that the first step estimates).",
    ),
}


class MemoryBank(Method):
    """An encoder and one stored key for every image, updated when the image is seen.

    The positive of a query is the stored key of its image, which is one epoch old and comes from
    another batch, so BN cannot leak. In the first epoch the stored keys are still noise, and the
    loss stays near chance.

    Args:
        encoder: its output is (N, dim).
        num_images: length of the bank; every ``index`` of a batch is below it.
        dim: C, length of a key.
        negatives: K, drawn at random at each step from the images that are not in the batch,
            without repetition and the same for all queries; at most ``num_images`` minus the batch.
        momentum: m of ``key <- normalise(m key + (1 - m) q)``, which acts on the representation of
            a sample and not on the encoder.
        temperature: T of the softmax.
        loss: ``softmax``, or ``nce`` for noise-contrastive estimation.
        seed: of the initial bank and of the negatives.
    """

    view_names = ("query view",)  # the keys come from earlier epochs
    log_mean: Tensor

    def __init__(
        self,
        encoder: ResNet,
        *,
        num_images: int,
        dim: int = 128,
        negatives: int = 65536,
        momentum: float = 0.5,
        temperature: float = 0.07,
        loss: str = "softmax",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settling_images = num_images  # during the first epoch the bank is still noise
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"BANK.MOMENTUM is {momentum}: it must lie in [0, 1).")
        if loss not in ("softmax", "nce"):
            raise UserError(f"BANK.LOSS is '{loss}': choose softmax or nce.")
        self.temperature = positive_temperature("MOCO.TEMPERATURE", temperature)
        self.nce = loss == "nce"
        if self.nce:  # log of the mean exponential of the first step; nan before it
            self.register_buffer("log_mean", torch.full((), torch.nan))
        self.negatives, self.momentum, self.seed = negatives, momentum, seed
        self.encoder_q = encoder
        self.bank = ShardedBank(num_images, dim, seed)

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> MemoryBank:
        """Build the memory bank from ``BANK`` and the head and temperature of ``MOCO``."""
        most = run.num_images - cfg.SOLVER.BATCH_SIZE
        if not 1 <= cfg.BANK.NEGATIVES <= most:
            raise UserError(
                f"BANK.NEGATIVES is {cfg.BANK.NEGATIVES}, but {run.num_images} images minus a "
                f"batch of {cfg.SOLVER.BATCH_SIZE} leave {most} to draw from: set it to a number "
                f"from 1 to {most}."
                if most > 0
                else f"The memory bank needs more images than a batch of {cfg.SOLVER.BATCH_SIZE}, "
                f"but the data holds {run.num_images}: lower SOLVER.BATCH_SIZE."
            )
        return cls(
            encoder_builder(cfg, run, contrastive_head(cfg, run))(),
            num_images=run.num_images,
            dim=cfg.MOCO.DIM,
            negatives=cfg.BANK.NEGATIVES,
            momentum=cfg.BANK.MOMENTUM,
            temperature=cfg.MOCO.TEMPERATURE,
            loss=cfg.BANK.LOSS,
            seed=cfg.SEED,
        )

    @classmethod
    def fewest_images(cls, cfg: CfgNode) -> int:
        """A batch and the negatives beside it."""
        return int(cfg.BANK.NEGATIVES + cfg.SOLVER.BATCH_SIZE)

    @property
    def chance_loss(self) -> float:
        """All keys look alike: log(K+1), or the cost of K + 1 binary decisions."""
        k = self.negatives
        return math.log(k + 1) + (k * math.log1p(1 / k) if self.nce else 0.0)

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Compare queries from the first view with keys from the bank."""
        q = unit(self.encoder_q(views[0]))  # NxC
        queries = comm.all_gather(q)  # BxC
        images = comm.all_gather(comm.to_device(index, q.device))  # B
        own = slice(comm.rank() * len(q), (comm.rank() + 1) * len(q))
        old = self.bank.rows(images)  # BxC
        # Each rank compares all queries with the negatives that it holds and contributes one sum
        # per query: no key leaves its rank.
        candidates, chosen = self.draw(images, step)
        held = self.bank.held(candidates)
        places, held = (comm.to_device(x, q.device) for x in (candidates[held], held))
        keys, counted = self.bank.own_rows(places), chosen[held]
        part = log_sum_exp(queries, keys, self.temperature, counted)
        parts = comm.all_gather(torch.stack(part)[None])  # Wx2xB
        log_sums, hardest = parts[:, 0].logsumexp(0), parts[:, 1, own].amax(0)  # B, N
        positive = (q * old[own]).sum(1) / self.temperature  # N
        if self.nce:
            self.estimate(log_sums.detach())
            rejected = noise_rejected(queries, keys, self.temperature, self.offset, counted)  # B
            rejected = comm.all_gather(rejected[None])[:, own].sum(0)  # N
            loss = (F.softplus(self.offset - positive) + rejected).mean()
        else:  # -log( e^p / (e^p + sum of the others) )
            loss = F.softplus(log_sums[own] - positive).mean()
        new = self.momentum * old + (1.0 - self.momentum) * queries.detach()  # BxC
        self.bank.write(images, unit(new))
        seen = (step + 1) * len(images)
        return {
            "loss": loss,
            "accuracy": (positive > hardest).float().mean(),
            "spread": embedding_spread(q.detach()),
            "queue_fill": loss.new_full((), min(1.0, seen / self.bank.size)),
        }

    def estimate(self, log_sums: Tensor) -> None:
        """Estimate the normalising constant, Z = n times the mean exponential, in the first step,
        and keep it from then on (Wu et al. 2018, Section 3.2).

        Args:
            log_sums: (B,) log of the sum over the negatives of each query of all ranks.
        """
        mean = log_sums.logsumexp(0) - math.log(self.negatives * len(log_sums))
        self.log_mean.copy_(torch.where(self.log_mean.isnan(), mean, self.log_mean))

    @property
    def offset(self) -> Tensor:
        """The logit at which an image is as likely as noise: with P = exp(logit) / Z, and noise
        uniform over the n images, log(P n / K) = logit - log(Z / n) - log(K)."""
        return self.log_mean + math.log(self.negatives)

    def draw(self, images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Draw K images that are not among the B ``images``, the same on every rank.

        K + B images in random order contain at least K that are not in the batch. The order is
        drawn on the CPU; which images are in the batch, only the device knows, and its answer is a
        mask, for which nobody has to wait.

        Returns:
            candidates: (K+B,) int64, on the CPU.
            chosen: (K+B,) bool, on the device of ``images``: the first K that are free.
        """
        order = torch.randperm(self.bank.size, generator=shared_generator(self.seed, step))
        candidates = order[: self.negatives + len(images)]
        taken, drawn = images.sort().values, comm.to_device(candidates, images.device)
        nearest = taken[torch.searchsorted(taken, drawn).clamp_(max=len(taken) - 1)]
        free = nearest != drawn
        return candidates, free & (free.cumsum(0) <= self.negatives)

    def before_save(self) -> None:
        """Gather the bank on rank 0, whose checkpoint holds all of it."""
        self.bank.gather()

    def memory(self, step: int, batch_size: int) -> Memory:
        """The rows of the bank that differ from its initial noise."""
        rows = self.bank.shard[: self.bank.size].float().cpu()
        noise = ShardedBank(self.bank.size, rows.shape[1], self.seed).shard
        written = rows[(rows != noise).any(1)]
        return Memory("memory bank", self.bank.size, len(written), written)


class ShardedBank(nn.Module):
    """``size`` unit vectors of length ``dim``, of which each rank holds an equal block of rows.

    A sharded bank needs no shared memory (a container's ``/dev/shm`` is small), stays on the device
    that uses it, and takes 1/W of the space on each: 1.28 million keys of 128 numbers take 655 MB
    over all ranks. The checkpoint holds the whole bank, from which any number of ranks can resume.
    The rows are an attribute and not a buffer, because data parallelism would broadcast rank 0's
    buffer.
    """

    def __init__(self, size: int, dim: int, seed: int) -> None:
        super().__init__()
        self.size = size
        world, rank = comm.world_size(), comm.rank()
        block = math.ceil(size / world)  # the last rank may have fewer rows than its block
        self.start, self.stop = min(rank * block, size), min((rank + 1) * block, size)
        generator = torch.Generator().manual_seed(seed)
        kept = [torch.empty(0, dim)]
        for first in range(0, size, _CHUNK):  # the same noise for any number of ranks
            noise = torch.randn(min(_CHUNK, size - first), dim, generator=generator)
            kept.append(noise[max(0, self.start - first) : max(0, self.stop - first)])
        # The last row takes what is written to rows of other ranks: writing to all places alike is
        # the only way that does not wait for the device.
        self._rows = torch.zeros(block + 1, dim)
        self.shard[: self.stop - self.start] = F.normalize(torch.cat(kept), dim=1)
        self._whole: Tensor | None = None

    @property
    def shard(self) -> Tensor:
        """The rows of this rank, moved with parameters and buffers by ``to``: (block, C)."""
        return self._rows[:-1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedBank:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._rows = fn(self._rows)
        return self

    def held(self, index: Tensor) -> Tensor:
        """Return the positions in ``index``, on the CPU, of the rows that this rank holds."""
        return self._holds(index).nonzero().flatten()

    def own_rows(self, index: Tensor) -> Tensor:
        """Return a copy of rows that this rank holds: (n, C); others give any of its rows."""
        return self.shard[(index - self.start).clamp(0, len(self.shard) - 1)]

    def rows(self, index: Tensor) -> Tensor:
        """Return rows from all ranks, on all ranks. Shape: (n,), equal on every rank -> (n, C)."""
        rows = torch.where(self._holds(index)[:, None], self.own_rows(index), 0)
        return distributed.all_reduce_sum(rows)

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Write (n, C) rows to (n,) places; the last of several rows for one place wins."""
        later = (index[:, None] == index[None, :]).triu(1).any(1)  # a later row has the same place
        mine = self._holds(index) & ~later
        self._rows[torch.where(mine, index - self.start, len(self.shard))] = rows
        self._whole = None

    def _holds(self, index: Tensor) -> Tensor:
        return (index >= self.start) & (index < self.stop)

    def gather(self) -> None:
        """Copy the whole bank into rank 0's memory, for its next ``state_dict()``; all ranks must
        call."""
        if comm.world_size() == 1:
            return
        parts = []
        for part in self.shard.split(_CHUNK):
            everyone = comm.all_gather(part[None])  # W x chunk x C
            if comm.rank() == 0:
                parts.append(everyone.cpu())
        if parts:
            self._whole = torch.cat(parts, 1).flatten(0, 1)[: self.size]

    def get_extra_state(self) -> Tensor:
        """(size, C): the whole bank, for the state dict."""
        if comm.world_size() == 1 or comm.rank() > 0:
            return self.shard
        if self._whole is None:
            raise RuntimeError("the bank is distributed: call before_save() on every rank first")
        return self._whole

    def set_extra_state(self, whole: Tensor) -> None:
        """Take this rank's rows from a whole bank."""
        if whole.shape != (self.size, self.shard.shape[1]):
            raise UserError(
                f"The checkpoint's memory bank holds {whole.shape[0]} keys of {whole.shape[1]} "
                f"numbers, but the data has {self.size} images: resume with the same --data."
            )
        self.shard[: self.stop - self.start] = whole[self.start : self.stop].to(self.shard)
        self._whole = None


_CHUNK = 65536  # rows processed at once, so that no device ever holds a second copy of the bank

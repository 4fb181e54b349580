"""The memory bank (Wu et al. 2018), as MoCo's paper compares with it (He et al. 2020, Fig. 2b)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from moco_common import comm
from moco_common.errors import UserError
from pretrain import distributed
from pretrain.losses import log_sum_exp
from pretrain.methods.base import Method, Run
from pretrain.methods.components import (
    contrastive_head,
    embedding_spread,
    encoder_builder,
    positive_temperature,
    shared_generator,
    unit,
)
from pretrain.modeling.resnet import ResNet


def build_memory_bank(cfg: CfgNode, run: Run) -> MemoryBank:
    """The rival of MoCo under MoCo's own pretext task: head and temperature are ``MOCO``'s."""
    most = run.num_images - cfg.SOLVER.BATCH_SIZE
    if not 1 <= cfg.BANK.NEGATIVES <= most:
        raise UserError(
            f"BANK.NEGATIVES is {cfg.BANK.NEGATIVES}, and {run.num_images} images less a batch of "
            f"{cfg.SOLVER.BATCH_SIZE} leave {most} to draw from: set it from 1 to {most}."
            if most > 0
            else f"The memory bank needs more images than a batch of {cfg.SOLVER.BATCH_SIZE}, and "
            f"the data holds {run.num_images}: lower SOLVER.BATCH_SIZE."
        )
    return MemoryBank(
        encoder_builder(cfg, run, contrastive_head(cfg, run))(),
        num_images=run.num_images,
        dim=cfg.MOCO.DIM,
        negatives=cfg.BANK.NEGATIVES,
        momentum=cfg.BANK.MOMENTUM,
        temperature=cfg.MOCO.TEMPERATURE,
        seed=cfg.SEED,
    )


class MemoryBank(Method):
    """An encoder and one key for every image of the data, updated when the image is seen.

    The positive of a query is what the bank holds of its image, one epoch old and from another
    batch, so BN cannot leak. In the first epoch that is still noise: the loss stays near chance.

    Args:
        encoder: its output is (N, dim).
        num_images: length of the bank; ``index`` of a batch lies below it.
        dim: C, length of a key.
        negatives: K, drawn at random in each step from the images that are not in the batch, the
            same for all queries, none twice; at most ``num_images`` less the batch.
        momentum: m of ``key <- normalise(m key + (1 - m) q)``, on the representation of a sample
            and not on the encoder.
        temperature: T of the softmax.
        seed: of the initial bank and of the negatives.
    """

    num_views = 1

    def __init__(
        self,
        encoder: ResNet,
        *,
        num_images: int,
        dim: int = 128,
        negatives: int = 65536,
        momentum: float = 0.5,
        temperature: float = 0.07,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settling_images = num_images  # in the first epoch the bank is still noise
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"BANK.MOMENTUM is {momentum}: it must lie in [0, 1).")
        self.temperature = positive_temperature("MOCO.TEMPERATURE", temperature)
        self.negatives, self.momentum, self.seed = negatives, momentum, seed
        self.encoder_q = encoder
        self.bank = ShardedBank(num_images, dim, seed)

    @property
    def chance_loss(self) -> float:
        """log(K+1)."""
        return math.log(self.negatives + 1)

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Queries from the first view, keys from the bank."""
        q = unit(self.encoder_q(views[0]))  # NxC
        self.bank.follow(q)
        queries = comm.all_gather(q)  # BxC
        images = comm.all_gather(index.to(q.device))  # B
        own = slice(comm.rank() * len(q), (comm.rank() + 1) * len(q))
        old = self.bank.rows(images)  # BxC
        # Each rank holds some of the negatives, compares all queries with those, and passes on one
        # sum a query: no key leaves its rank.
        part = log_sum_exp(queries, self.bank.own_rows(self.draw(images, step)), self.temperature)
        parts = comm.all_gather(torch.stack(part)[None])[..., own]  # Wx2xN
        log_sum, hardest = parts[:, 0].logsumexp(0), parts[:, 1].amax(0)  # N, N
        positive = (q * old[own]).sum(1) / self.temperature  # N
        loss = F.softplus(log_sum - positive).mean()  # -log( e^p / (e^p + sum of the others) )
        new = self.momentum * old + (1.0 - self.momentum) * queries.detach()  # BxC
        self.bank.write(images, unit(new))
        seen = (step + 1) * len(images)
        return {
            "loss": loss,
            "accuracy": (positive > hardest).float().mean(),
            "spread": embedding_spread(q.detach()),
            "queue_fill": torch.tensor(min(1.0, seen / self.bank.size)),
        }

    def draw(self, images: Tensor, step: int) -> Tensor:
        """K images that are none of ``images``, the same on every rank: (K,) int64."""
        taken = images.unique().cpu()  # sorted
        generator = shared_generator(self.seed, step)
        chosen = torch.randperm(self.bank.size - len(taken), generator=generator)[: self.negatives]
        # The j-th image that is free is j plus the number of taken ones up to it.
        chosen += torch.searchsorted(taken - torch.arange(len(taken)), chosen, right=True)
        return chosen.to(images.device)

    def before_save(self) -> None:
        """Bring the bank together on rank 0, in whose checkpoint it is whole."""
        self.bank.gather()


class ShardedBank(nn.Module):
    """``size`` unit vectors of length ``dim``, of which each rank holds an equal block of rows.

    Sharded, because it needs no common memory (a container's ``/dev/shm`` is small), stays on the
    device where it is used, and takes 1/W of the room on each: 1.28 million keys of 128 numbers
    are 655 MB for all ranks together. In the checkpoint it is whole, and any number of ranks can go
    on with it. The rows are an attribute and no buffer, or data parallelism would broadcast rank
    0's.
    """

    def __init__(self, size: int, dim: int, seed: int) -> None:
        super().__init__()
        self.size = size
        world, rank = comm.world_size(), comm.rank()
        block = math.ceil(size / world)  # the last rank's may be longer than what is left for it
        self.start, self.stop = min(rank * block, size), min((rank + 1) * block, size)
        generator = torch.Generator().manual_seed(seed)
        kept = [torch.empty(0, dim)]
        for first in range(0, size, _CHUNK):  # the same noise for any number of ranks
            noise = torch.randn(min(_CHUNK, size - first), dim, generator=generator)
            kept.append(noise[max(0, self.start - first) : max(0, self.stop - first)])
        self.shard = torch.zeros(block, dim)  # block x C
        self.shard[: self.stop - self.start] = F.normalize(torch.cat(kept), dim=1)
        self._whole: Tensor | None = None

    def follow(self, x: Tensor) -> None:
        """Move to the device and dtype of ``x``."""
        self.shard = self.shard.to(x)

    def own_rows(self, index: Tensor) -> Tensor:
        """Those of the rows that this rank holds, as a copy: (number of them, C)."""
        return self.shard[index[self._holds(index)] - self.start]

    def rows(self, index: Tensor) -> Tensor:
        """Rows from all ranks, on all ranks. Shape: (n,), equal on every rank -> (n, C)."""
        result = self.shard.new_zeros(len(index), self.shard.shape[1])
        result[self._holds(index)] = self.own_rows(index)
        return distributed.all_reduce_sum(result)

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Put (n, C) rows at (n,) places; of two at the same place the later one."""
        later = (index[:, None] == index[None, :]).triu(1).any(1)  # a row after it has its place
        mine = self._holds(index) & ~later
        self.shard[index[mine] - self.start] = rows[mine]
        self._whole = None

    def _holds(self, index: Tensor) -> Tensor:
        return (index >= self.start) & (index < self.stop)

    def gather(self) -> None:
        """All ranks: copy the whole bank into rank 0's memory, for its next ``state_dict()``."""
        if comm.world_size() == 1:
            return
        parts = [comm.all_gather(part[None]) for part in self.shard.split(_CHUNK)]
        if comm.rank() == 0:
            whole = torch.cat([part.cpu() for part in parts], 1)  # W x block x C
            self._whole = whole.flatten(0, 1)[: self.size]

    def get_extra_state(self) -> Tensor:
        """(size, C): what the state dict holds of the bank."""
        if comm.world_size() == 1 or comm.rank() > 0:
            return self.shard
        if self._whole is None:
            raise RuntimeError("the bank lies in parts: call before_save() on every rank first")
        return self._whole

    def set_extra_state(self, whole: Tensor) -> None:
        """Take this rank's rows of a whole bank."""
        if whole.shape != (self.size, self.shard.shape[1]):
            raise UserError(
                f"The checkpoint's memory bank holds {whole.shape[0]} keys of {whole.shape[1]} "
                f"numbers, and the data has {self.size} images: go on with the same --data."
            )
        self.shard[: self.stop - self.start] = whole[self.start : self.stop].to(self.shard)
        self._whole = None


_CHUNK = 65536  # rows handled at once, so that no device ever holds a second copy of the bank

"""Scalars and unreadable images, collected over the steps of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moco_common import comm
from moco_common.errors import UserError
from moco_common.files import append_text, read_text
from pretrain import distributed
from pretrain.checkpoint.consistency import way_on

SKIPPED = "skipped_images.txt"


class Scalars:
    """Means of scalars over steps and ranks.

    Nothing is read from the device until `settle`, so that no step waits for the one before.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._fresh: list[Tensor] = []  # a row of scalars for each step since `settle`
        self._settled: list[Tensor] = []  # (steps, scalars), means over the ranks

    def add(self, outputs: dict[str, Tensor], skipped: int = 0) -> None:
        """Add the scalars of one step; the names must be the same in every step.

        Args:
            skipped: number of images that this rank could not read.
        """
        self._names = list(outputs)
        row = torch.stack([value.float() for value in outputs.values()])
        self._fresh.append(torch.cat([row, row.new_full((1,), skipped)]))

    def settle(self, step: int, saved: int = 0) -> bool:
        """Average over the ranks after ``step`` steps. All ranks must call this.

        Args:
            saved: the step of the last checkpoint, see `way_on`.

        Returns:
            Whether any rank has skipped images in these steps, the same on every rank.

        Raises:
            UserError: on every rank, if the loss of any rank is not finite; the message names the
                step.
        """
        if not self._fresh:
            return False
        rows = torch.stack(self._fresh)
        distributed.all_reduce_mean([rows])
        rows, self._fresh = rows.cpu(), []
        for i, loss in enumerate(rows[:, self._names.index("loss")].tolist()):
            if not math.isfinite(loss):
                raise UserError(
                    f"The loss is {loss} at iteration {step - len(rows) + i + 1}: lower "
                    f"SOLVER.BASE_LR, and {way_on(saved)}."
                )
        self._settled.append(rows[:, :-1])
        return bool(rows[:, -1].sum() > 0)

    def take(self) -> dict[str, float]:
        """Return the means by name over the settled steps since the last call."""
        means = torch.cat(self._settled).mean(0)
        self._settled.clear()
        return dict(zip(self._names, means.tolist(), strict=True))


class SkippedImages:
    """The list of unreadable images, ``skipped_images.txt``: each image once, with the reason.

    Rank 0 writes for all ranks. A resumed run extends the list.

    Attributes:
        count: number of images in the list, on rank 0.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SKIPPED
        self._fresh: list[tuple[str, str]] = []
        self._listed: set[str] = set()
        if comm.rank() == 0 and self.path.exists():
            lines = read_text(self.path).splitlines()
            self._listed = {line.partition("\t")[0] for line in lines}
        self.count = len(self._listed)

    def add(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Add the names and reasons of one batch."""
        self._fresh += skipped

    def settle(self) -> None:
        """Write the images added since the last call to the list. All ranks must call this."""
        mine = "".join(f"{_plain(name)}\t{_plain(reason)}\n" for name, reason in self._fresh)
        self._fresh = []
        lines = "".join(distributed.all_gather_text(mine)).splitlines()
        if comm.rank() != 0:
            return
        news = {line.partition("\t")[0]: line for line in lines}
        fresh = [line for name, line in news.items() if name not in self._listed]
        if fresh:
            append_text(self.path, "".join(f"{line}\n" for line in fresh))
            self._listed |= set(news)
            self.count = len(self._listed)


def _plain(text: str) -> str:
    """Put text on one line, without tabs, and make it encodable for any bytes in a name."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())

"""Detection of collapse, few dimensions, plateau and leak during a run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean

from pretrain.methods.base import REMEDIES

ALIKE = 0.1  # spread below which embeddings count as equal; random unit vectors have 1
FEW = 2.0  # RankMe below which embeddings differ along one dimension only
AT_CHANCE = 0.985  # fraction of the chance loss above which the loss counts as chance


def patience(settling_images: int, batch_size: int) -> int:
    """Steps before the first warning: enough to show ``settling_images`` twice, at least 200."""
    return max(200, 2 * math.ceil(settling_images / batch_size))


class Monitor:
    """Observes loss, accuracy, spread and rank, and issues each warning once.

    Args:
        chance_loss: loss of an encoder that has learned nothing, such as log(K+1); None if there is
            no such number, in which case only the spread is checked.
        patience: steps before the first warning: at the start the loss *is* at chance, and a queue
            must be filled with keys before the accuracy means anything. A plateau gets twice as
            many.
        remedies: "collapse", "plateau" and "leak" -> what to do about it.
        window: number of observations that are averaged; each is itself a mean over the steps of a
            progress line.
    """

    def __init__(
        self,
        chance_loss: float | None,
        patience: int,
        remedies: Mapping[str, str] = REMEDIES,
        window: int = 3,
    ) -> None:
        self.chance_loss = chance_loss
        self.patience = patience
        self.remedies = remedies
        self.losses: deque[float] = deque(maxlen=window)
        self.accuracies: deque[float] = deque(maxlen=window)
        self.spreads: deque[float] = deque(maxlen=window)
        self.issued: set[str] = set()

    def observe(
        self,
        step: int,
        loss: float,
        spread: float,
        accuracy: float = 0.0,
        rank: float | None = None,
    ) -> str | None:
        """Take the means over the steps since the last call.

        Args:
            rank: RankMe of recent embeddings, see `pretrain.engine.embedding_rank`.

        Returns:
            a warning with symptom, likely cause and remedy, the first time that its condition
            holds; otherwise None.
        """
        self.losses.append(loss)
        self.spreads.append(spread)
        self.accuracies.append(accuracy)
        if step < self.patience or len(self.losses) < (self.losses.maxlen or 0):
            return None
        loss, spread, accuracy = map(fmean, (self.losses, self.spreads, self.accuracies))
        chance = self.chance_loss
        if rank is not None and rank < FEW and spread >= ALIKE:
            return self._once(
                "few dimensions",
                f"the embeddings differ (spread {spread:.2f}), but along one dimension only "
                f"(RankMe {rank:.1f}): the encoder has collapsed in all others. Lower "
                f"SOLVER.BASE_LR, or use more varied images.",
            )
        if chance is None:
            if spread < ALIKE:
                return self._once(
                    "collapse",
                    f"all embeddings are nearly equal (spread {spread:.3f} of 1): the encoder has "
                    f"collapsed. {self.remedies['collapse']}",
                )
        elif loss > AT_CHANCE * chance and spread < ALIKE:
            return self._once(
                "collapse",
                f"the loss stays at chance, {chance:.2f}, and all embeddings are nearly equal "
                f"(spread {spread:.3f} of 1): the encoder has collapsed or has not yet left its "
                f"initial plateau. {self.remedies['collapse']}",
            )
        elif loss > AT_CHANCE * chance:
            if step < 2 * self.patience:  # many runs leave the plateau by themselves
                return None
            return self._once(
                "plateau",
                f"the loss is still at chance, {chance:.2f}, although the embeddings differ "
                f"(spread {spread:.2f}). If it does not fall soon, the two views of an image have "
                f"too little in common, or the learning rate is unsuitable. "
                f"{self.remedies['plateau']}",
            )
        elif accuracy > 0.985 and loss < 0.05 * chance:
            return self._once(
                "leak",
                f"the contrastive accuracy is {accuracy:.1%}: the encoder solves the task by a "
                f"shortcut. {self.remedies['leak']}",
            )
        return None

    def _once(self, kind: str, text: str) -> str | None:
        if kind in self.issued:
            return None
        self.issued.add(kind)
        return text

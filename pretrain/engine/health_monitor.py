"""What a run tells about its health while it lasts: collapse, plateau, leak."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean

from pretrain.methods.base import REMEDIES

ALIKE = 0.1  # spread below which embeddings count as one; random unit vectors have 1
AT_CHANCE = 0.985  # of the loss of an encoder that knows nothing


def patience(settling_images: int, batch_size: int) -> int:
    """Steps before a run is judged: what has to settle has been gone through twice, and at least
    200."""
    return max(200, 2 * math.ceil(settling_images / batch_size))


class Monitor:
    """Watches loss, accuracy and spread, and words each warning once.

    Args:
        chance_loss: loss of an encoder that knows nothing, such as log(K+1); None where there is no
            such number, and only the spread can tell.
        patience: steps before anything is said; at the start the loss *is* at chance, and a queue
            must have been filled with keys for accuracy to mean anything.
        remedies: "collapse", "plateau" and "leak" -> what to do about it.
        window: observations averaged; each is a progress line, a mean over its steps.
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
        self.said: set[str] = set()

    def observe(self, step: int, loss: float, spread: float, accuracy: float = 0.0) -> str | None:
        """Take in the means of the steps since the last call; no accuracy is none to speak of.

        Returns:
            a sentence with symptom, likely cause and mend, the first time that its condition holds;
            else None.
        """
        self.losses.append(loss)
        self.spreads.append(spread)
        self.accuracies.append(accuracy)
        if step < self.patience or len(self.losses) < (self.losses.maxlen or 0):
            return None
        loss, spread, accuracy = map(fmean, (self.losses, self.spreads, self.accuracies))
        chance = self.chance_loss
        if chance is None:
            if spread < ALIKE:
                return self._once(
                    "collapse",
                    f"all embeddings are alike (spread {spread:.3f} of 1): the encoder has "
                    f"collapsed.",
                )
        elif loss > AT_CHANCE * chance and spread < ALIKE:
            return self._once(
                "collapse",
                f"the loss stays at chance, {chance:.2f}, and all embeddings are alike (spread "
                f"{spread:.3f} of 1): the encoder has collapsed or not yet left the plateau of its "
                f"start.",
            )
        elif loss > AT_CHANCE * chance:
            return self._once(
                "plateau",
                f"the loss stays at chance, {chance:.2f}, although the embeddings differ (spread "
                f"{spread:.2f}): the two views of an image share too little, or the learning rate "
                f"is off.",
            )
        elif accuracy > 0.985 and loss < 0.05 * chance:
            return self._once(
                "leak",
                f"the contrastive accuracy is {accuracy:.1%}: the task is solved by a shortcut.",
            )
        return None

    def _once(self, kind: str, symptom: str) -> str | None:
        if kind in self.said:
            return None
        self.said.add(kind)
        return f"{symptom} {self.remedies[kind]}"

"""What a contrastive run tells about its health: collapse, plateau, leak."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean


def patience(queue_size: int, batch_size: int) -> int:
    """Steps before a run is judged: the queue has been filled twice, and at least 200."""
    return max(200, 2 * math.ceil(queue_size / batch_size))


class Monitor:
    """Watches loss, accuracy and spread, and words each warning once.

    Args:
        chance_loss: loss of an encoder that knows nothing, log(K+1).
        patience: steps before anything is said; at the start the loss *is* at log(K+1), and the
            queue must have been filled with keys for accuracy to mean anything.
        window: observations averaged; each is a progress line, a mean over its steps.
    """

    def __init__(self, chance_loss: float, patience: int, window: int = 3) -> None:
        self.chance_loss = chance_loss
        self.patience = patience
        self.losses: deque[float] = deque(maxlen=window)
        self.accuracies: deque[float] = deque(maxlen=window)
        self.spreads: deque[float] = deque(maxlen=window)
        self.said: set[str] = set()

    def observe(self, step: int, loss: float, accuracy: float, spread: float) -> str | None:
        """Take in the means of the steps since the last call.

        Returns:
            a sentence with symptom, likely cause and mend, the first time that its condition holds;
            else None.
        """
        self.losses.append(loss)
        self.accuracies.append(accuracy)
        self.spreads.append(spread)
        if step < self.patience or len(self.losses) < (self.losses.maxlen or 0):
            return None
        if fmean(self.losses) > 0.985 * self.chance_loss:
            if fmean(self.spreads) < 0.1:
                return self._once(
                    "collapse",
                    f"the loss stays at log(K+1) = {self.chance_loss:.2f} and all embeddings are "
                    f"alike (spread {fmean(self.spreads):.3f} of 1): the encoder has collapsed or "
                    f"not yet left the plateau of its start. Lower SOLVER.BASE_LR or "
                    f"MOCO.MOMENTUM, "
                    f"or give the head BN (MOCO.MLP_BN True); on small data a shorter "
                    f"MOCO.QUEUE_SIZE helps too.",
                )
            return self._once(
                "plateau",
                f"the loss stays at log(K+1) = {self.chance_loss:.2f} although the embeddings "
                f"differ (spread {fmean(self.spreads):.2f}): the two views of an image share too "
                f"little, or the learning rate is off. Raise INPUT.MIN_SCALE or change "
                f"SOLVER.BASE_LR.",
            )
        if fmean(self.accuracies) > 0.985 and fmean(self.losses) < 0.05 * self.chance_loss:
            return self._once(
                "leak",
                f"the contrastive accuracy is {fmean(self.accuracies):.1%}: the task is solved "
                f"by a shortcut. Usual causes: BN statistics that betray the key "
                f"(MOCO.SHUFFLE_BN False, or one BN group), views that hardly differ "
                f"(INPUT.MIN_SCALE too high), or a queue of a few hundred keys.",
            )
        return None

    def _once(self, kind: str, text: str) -> str | None:
        if kind in self.said:
            return None
        self.said.add(kind)
        return text

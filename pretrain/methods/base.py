"""What the training loop asks of a method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Method(nn.Module):
    """A pre-training method. The loop knows nothing more of it than this."""

    @property
    def chance_loss(self) -> float:
        """Loss of an encoder that knows nothing; the monitor compares with it."""
        raise NotImplementedError

    def forward(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """One step on this rank's share of the batch.

        Args:
            views: one (N, 3, H, W) uint8 batch a view.
            step: number of the step, the same on every rank.

        Returns:
            ``loss``, a scalar with gradient, and scalars without: ``accuracy`` and ``spread`` for
            the monitor, ``queue_fill``, and whatever else is worth a curve.
        """
        raise NotImplementedError

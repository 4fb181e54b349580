"""What the training loop asks of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

# What to do about each of them, whatever the method; a method may know more (`Method.remedies`).
REMEDIES = {
    "collapse": "Lower SOLVER.BASE_LR or raise SOLVER.WARMUP_ITERS.",
    "plateau": "Raise INPUT.MIN_SCALE or change SOLVER.BASE_LR.",
    "leak": "Usual causes: BN statistics that betray the positive (MODEL.SYNC_BN False where the "
    "method needs it), or views that hardly differ (INPUT.MIN_SCALE too high).",
}


@dataclass(frozen=True)
class Run:
    """What a method may want to know of the run that it is built for.

    Attributes:
        num_images: images of the source; `index` of a batch lies below it.
        total_steps: length of the run (and of every schedule).
        bn_groups: groups into which each rank splits its batch for BN, see `SplitBatchNorm2d`.
    """

    num_images: int
    total_steps: int
    bn_groups: int


class Method(nn.Module):
    """A pre-training method. The loop knows nothing more of it than this.

    ``encoder_q`` is the encoder whose backbone is exported; whatever a run needs to go on is a
    parameter or a persistent buffer.
    """

    encoder_q: nn.Module
    num_views: int | None = None  # of an image that it looks at; None: all that the recipe has
    settling_images: int = 0  # shown before its figures mean something: a queue has to fill
    remedies: Mapping[str, str] = REMEDIES  # of what the monitor warns

    @property
    def chance_loss(self) -> float | None:
        """Loss of an encoder that knows nothing, with which the monitor compares; None where there
        is no such number."""
        raise NotImplementedError

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """One step on this rank's share of the batch.

        Args:
            views: one (N, 3, H, W) uint8 batch a view; H and W may differ between views.
            step: number of the step, the same on every rank.
            index: (N,) int64, which image of the source each row shows.

        Returns:
            ``loss``, a scalar with gradient, and scalars without: ``spread`` and, where the method
            has them, ``accuracy`` (for the monitor) and ``queue_fill``, and whatever else is worth
            a curve.
        """
        raise NotImplementedError

    def before_update(self, step: int) -> None:
        """Called between backward pass and optimiser step; gradients may be changed."""

    def after_update(self, step: int, total_steps: int) -> None:
        """Called after the optimiser step; a target network may follow here."""

    def before_save(self) -> None:
        """Called on every rank before rank 0 takes ``state_dict()``: the place to bring together
        what the ranks hold in parts."""

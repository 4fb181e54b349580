"""The interface between a method and the rest of the package.

Beside its class, a method's file declares, as literals:

``KEYS``
    its own configuration keys: ``{"SECTION.KEY": (default, "Description."), ...}``;
``SHARED``
    sections of other methods that it reads as well, such as ``("MOCO",)``.

The first paragraph of the file's docstring is what ``--explain`` prints about the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from pretrain.data.source_base import Source

# What helps against each problem that the monitor detects, with any method.
REMEDIES = {
    "collapse": "Lower SOLVER.BASE_LR or raise SOLVER.WARMUP_ITERS.",
    "plateau": "Raise INPUT.MIN_SCALE or change SOLVER.BASE_LR.",
    "leak": "Usual causes: BN statistics that identify the positive (MODEL.SYNC_BN False where the "
    "method needs it), or views that hardly differ (INPUT.MIN_SCALE too high).",
}


@dataclass(frozen=True)
class Run:
    """Facts about the run that a method is built for.

    Attributes:
        num_images: number of images in the source; every `index` of a batch is below it.
        total_steps: length of the run, and of every schedule.
        bn_groups: groups into which each rank splits its batch for BN, see `SplitBatchNorm2d`.
        labels: (num_images,) int64, class of each image; None if not known.
    """

    num_images: int
    total_steps: int
    bn_groups: int
    labels: Tensor | None = None


@dataclass(frozen=True)
class Memory:
    """Embeddings of past batches that a method keeps, for the inspector.

    Attributes:
        kind: a name for it, such as "queue".
        size: number of places.
        filled: number of places that hold embeddings and not the initial values.
        vectors: (N, C) the embeddings in these places.
        pointer: the place that is written next; None where there is no such place.
        momentum: of the encoder that computes the embeddings; None where it is trained by gradient.
        stale: what to do when most of that encoder has changed since the oldest was computed.
        notes: inconsistencies, one sentence each.
    """

    kind: str
    size: int
    filled: int
    vectors: Tensor
    pointer: int | None = None
    momentum: float | None = None
    stale: str = ""
    notes: tuple[str, ...] = ()


class Method(nn.Module):
    """A pre-training method. The training loop and the inspector use nothing but this interface.

    ``encoder_q`` is the encoder whose backbone is exported. All state that a resumed run needs is a
    parameter or a persistent buffer.

    Attributes:
        view_names: names of the views that the method uses, one each, in the order of the recipe;
            None if it uses all of them, whatever their number (multi-crop).
        uses_places: True if `forward` takes ``places``, a (views, N, 5) tensor, as its last
            argument: left, top, right and bottom of each view as fractions of its image, and 1
            where it is flipped, else 0.
        settling_images: images shown before loss and accuracy mean something, such as the length of
            a queue.
        remedies: problem that the monitor detects -> what to do about it.
    """

    encoder_q: nn.Module
    view_names: tuple[str, ...] | None = None
    uses_places: bool = False
    settling_images: int = 0
    remedies: Mapping[str, str] = REMEDIES

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> Method:
        """Build the method from a configuration; only here does a method read one."""
        raise NotImplementedError

    @classmethod
    def complete(cls, cfg: CfgNode, source: Source) -> None:
        """Set keys whose values depend on the images, such as the number of classes; called before
        a run records its configuration.

        Raises:
            UserError: the method cannot be trained on these images.
        """

    @classmethod
    def fewest_images(cls, cfg: CfgNode) -> int:
        """The smallest number of images that a run with this configuration can have."""
        return 1

    @property
    def num_views(self) -> int | None:
        """Number of views of an image that the method uses; None: all that the recipe has."""
        return None if self.view_names is None else len(self.view_names)

    @property
    def chance_loss(self) -> float | None:
        """Loss of an encoder that has learned nothing; None where there is no such number."""
        raise NotImplementedError

    def forward(self, views: Sequence[Tensor], step: int, index: Tensor) -> dict[str, Tensor]:
        """Compute the loss of one step on this rank's share of the batch.

        Args:
            views: one (N, 3, H, W) uint8 batch per view; H and W may differ between views.
            step: number of the step, the same on every rank.
            index: (N,) int64, the image of the source that each row shows.

        Returns:
            On the device of the views, so that no step waits for it: ``loss``, a scalar with
            gradient, and scalars without gradient: ``spread``, and optionally ``accuracy`` (both
            for the monitor), ``queue_fill`` and any other scalar to be logged.
        """
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """Embed the backbone's averaged features by the projection head, for the inspector.

        Shape: (N, F) -> (N, C).
        """
        embeddings: Tensor = self.encoder_q.get_submodule("fc")(features)
        return embeddings

    def before_update(self, step: int) -> None:
        """Change gradients, if needed: called between backward pass and optimiser step."""

    def after_update(self, step: int, total_steps: int) -> None:
        """Update a momentum network, if there is one: called after the optimiser step."""

    def before_save(self) -> None:
        """Collect state that is distributed over the ranks: called on every rank before rank 0
        takes ``state_dict()``."""

    def memory(self, step: int, batch_size: int) -> Memory | None:
        """Embeddings that the method keeps after ``step`` steps; None if it keeps none."""
        return None

    def match(self, views: Sequence[Tensor]) -> Tensor | None:
        """For each cell of the first view's feature map, the cell of the second's that the method
        finds most similar, (N, h, w) int64, row by row; None if it compares no cells."""
        return None

    def slots(self, view: Tensor) -> Tensor | None:
        """The most similar slot of each cell of a view, (N, h, w) int64; None without slots."""
        return None

    def cluster_centres(self) -> Tensor | None:
        """(P, C) prototypes to which embeddings are assigned; None if there are none."""
        return None

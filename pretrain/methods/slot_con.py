"""SlotCon (Wen et al. 2022, "Self-Supervised Visual Representation Learning with Semantic
Grouping"), in the order of its Section 3: the cells of a feature map are grouped by learned slots,
as a moving average of the network groups them in the other view, and the slots that both views
contain are contrasted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from moco_common import comm
from moco_common.errors import UserError
from pretrain import distributed
from pretrain.losses import assignment_distillation, slot_means
from pretrain.methods.base import REMEDIES, Method, Run
from pretrain.methods.byol import target_momentum
from pretrain.methods.components import (
    cells,
    embedding_spread,
    encoder_builder,
    follow,
    mean_of_valid,
    positive_temperature,
    unit,
)
from pretrain.methods.correspondence import overlap, resample
from pretrain.modeling.batch_norm import SplitBatchNorm2d
from pretrain.modeling.heads import MapHead, per_cell
from pretrain.modeling.resnet import ResNet

KEYS = {
    "SLOTCON.HIDDEN": (4096, "Hidden units of the projector and of the slot predictor."),
    "SLOTCON.DIM": (256, "Length of a projection and of a slot."),
    "SLOTCON.SLOTS": (256, "Number of slots, K, about the number of kinds of things."),
    "SLOTCON.GROUP_WEIGHT": (
        0.5,
        "Weight of the grouping loss. That of the contrast of slots is 1 minus it.",
    ),
    "SLOTCON.STUDENT_TEMPERATURE": (0.1, "Temperature of the student's assignments."),
    "SLOTCON.TEACHER_TEMPERATURE": (
        0.07,
        "Temperature of the teacher's assignments and of the attention that forms slots.",
    ),
    "SLOTCON.SLOT_TEMPERATURE": (0.2, "Temperature of the contrast of slots."),
    "SLOTCON.CENTRE_MOMENTUM": (0.9, "Momentum of the centre of the teacher's assignments."),
    "SLOTCON.MOMENTUM": (
        0.99,
        "Momentum of the teacher at the first step. It rises to 1 by the end of the run.",
    ),
}


class SlotCon(Method):
    """A network and its moving average, each with a projector of cells and K slots.

    Args:
        build_encoder: makes backbone, projector and slots, with `Grouping` as the head; called
            twice, for student and teacher.
        predictor: of slots, in the student only.
        slots: K.
        group_weight: weight of the grouping loss.
        student_temperature, teacher_temperature, slot_temperature: see the keys of ``SLOTCON``.
        centre_momentum: of the centre.
        momentum: of the teacher at the first step; it rises to 1 along half a cosine.
    """

    view_names = ("view 1 (T)", "view 2 (T')")  # each goes through both networks
    uses_places = True
    centre: Tensor
    remedies = REMEDIES | {
        "collapse": "Lower SOLVER.BASE_LR, or raise SLOTCON.MOMENTUM: the teacher must lag behind."
    }

    def __init__(
        self,
        build_encoder: Callable[[], ResNet],
        predictor: SlotPredictor,
        *,
        slots: int,
        group_weight: float = 0.5,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        slot_temperature: float = 0.2,
        centre_momentum: float = 0.9,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        for key, value in (
            ("GROUP_WEIGHT", group_weight),
            ("CENTRE_MOMENTUM", centre_momentum),
            ("MOMENTUM", momentum),
        ):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"SLOTCON.{key} is {value}: it must lie in [0, 1].")
        self.student_t, self.teacher_t, self.slot_t = (
            positive_temperature(f"SLOTCON.{kind}_TEMPERATURE", value)
            for kind, value in (
                ("STUDENT", student_temperature),
                ("TEACHER", teacher_temperature),
                ("SLOT", slot_temperature),
            )
        )
        self.group_weight, self.centre_momentum = group_weight, centre_momentum
        self.momentum = momentum
        self.encoder_q = build_encoder()
        self.predictor = predictor
        self.target = build_encoder()
        self.target.load_state_dict(self.encoder_q.state_dict())
        self.target.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(slots))  # K

    @classmethod
    def from_config(cls, cfg: CfgNode, run: Run) -> SlotCon:
        """Build SlotCon from ``SLOTCON``."""
        keys = cfg.SLOTCON
        if keys.SLOTS < 2:
            raise UserError(f"SLOTCON.SLOTS is {keys.SLOTS}: it must be at least 2.")
        head = lambda n: Grouping(n, keys.HIDDEN, keys.DIM, keys.SLOTS, run.bn_groups)  # noqa: E731
        return cls(
            encoder_builder(cfg, run, head),
            SlotPredictor(keys.DIM, keys.HIDDEN),
            slots=keys.SLOTS,
            group_weight=keys.GROUP_WEIGHT,
            student_temperature=keys.STUDENT_TEMPERATURE,
            teacher_temperature=keys.TEACHER_TEMPERATURE,
            slot_temperature=keys.SLOT_TEMPERATURE,
            centre_momentum=keys.CENTRE_MOMENTUM,
            momentum=keys.MOMENTUM,
        )

    @property
    def chance_loss(self) -> None:
        """None: the number of slots in the contrast changes with every batch."""
        return None

    def forward(
        self, views: Sequence[Tensor], step: int, index: Tensor, places: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Group and contrast in both directions.

        Returns:
            ``loss``, ``spread`` of the cells, ``overlap``, the fraction of images whose views
            overlap, and ``slots``, the mean number of slots of an image.
        """
        assert places is not None
        student = [self.encoder_q(view) for view in views]  # NxCxhxw, NxKxhxw
        with torch.no_grad():
            teacher = [self.target(view) for view in views]
        region, valid = overlap(places[0], places[1])
        aligned, wanted = (
            [
                resample(scores, place, region)
                for (_, scores), place in zip(maps, places, strict=True)
            ]
            for maps in (student, teacher)
        )
        group, slot = [], []
        for one, other in ((0, 1), (1, 0)):
            per_image = assignment_distillation(
                aligned[one], wanted[other], self.centre, self.student_t, self.teacher_t
            )
            group.append(mean_of_valid(per_image, valid))
            slot.append(self.contrast(student[one], teacher[other]))
        weight = self.group_weight
        self.update_centre(torch.stack([scores for _, scores in teacher]))
        return {
            "loss": weight * (group[0] + group[1]) + (1 - weight) * (slot[0] + slot[1]),
            "spread": embedding_spread(unit(cells(student[0][0].detach()))),
            "overlap": valid.float().mean(),
            "slots": present(student[0][1]).float().sum(1).mean(),
        }

    def contrast(self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        """InfoNCE of the slots that a view of an image shares with the other view, against the
        teacher's slots of all images (Eq. 6); 2 tau scales it as in MoCo v3."""
        own, others = present(student[1]), present(teacher[1])  # NxK
        # An image has at most as many slots as cells: fixed shapes, so that no GPU is awaited.
        most = min(own.shape[1], teacher[1][0, 0].numel())
        chosen = others.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # NxM
        pick = chosen[:, :, None].expand(-1, -1, student[0].shape[1])  # NxMxC
        q = slot_means(*student, self.teacher_t).gather(1, pick).flatten(0, 1)  # N*MxC
        k = slot_means(*teacher, self.teacher_t).gather(1, pick).flatten(0, 1)
        filled = others.gather(1, chosen).flatten()  # N*M
        valid = (own & others).gather(1, chosen).flatten()
        prediction = unit(self.predictor(q, valid))
        logits = prediction @ comm.all_gather(unit(k)).T / self.slot_t  # N*MxB*M
        logits = logits.masked_fill(~comm.all_gather(filled), -torch.inf)
        positive = comm.rank() * len(q) + torch.arange(len(q), device=q.device)
        losses = F.cross_entropy(logits, positive, reduction="none")  # inf where not filled
        return 2 * self.slot_t * mean_of_valid(losses, valid)

    @torch.no_grad()
    def update_centre(self, scores: Tensor) -> None:
        """Update the mean of the teacher's cosines over all cells, views and ranks.

        Shape: (V, N, K, h, w).
        """
        mean = distributed.all_reduce_sum(scores.mean((0, 1, 3, 4))) / comm.world_size()
        self.centre.lerp_(mean.to(self.centre.dtype), 1.0 - self.centre_momentum)

    def after_update(self, step: int, total_steps: int) -> None:
        """Update the teacher, its slots included."""
        follow(self.target, self.encoder_q, target_momentum(self.momentum, step, total_steps))

    def slots(self, view: Tensor) -> Tensor:
        """By the teacher, whose assignments the student learns."""
        nearest: Tensor = self.target(view)[1].argmax(1)
        return nearest

    def project(self, features: Tensor) -> Tensor:
        """The projector's embeddings, as of a map of one cell."""
        z, _ = self.encoder_q.get_submodule("fc")(features[:, :, None, None])
        return torch.flatten(z, 1)

    def cluster_centres(self) -> Tensor:
        """The slots."""
        slots: Tensor = self.encoder_q.get_parameter("fc.slots")
        return slots


class Grouping(MapHead):
    """A projector of cells, and slots (prototypes) with which the projections are compared.

    Shape: (N, F, h, w) -> projections (N, C, h, w), and their cosines with the slots (N, K, h, w).
    """

    def __init__(self, features: int, hidden: int, dim: int, slots: int, bn_groups: int) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            per_cell(features, hidden),
            SplitBatchNorm2d(hidden, bn_groups),
            nn.GELU(),
            per_cell(hidden, hidden),
            SplitBatchNorm2d(hidden, bn_groups),
            nn.GELU(),
            per_cell(hidden, dim),
        )
        self.projector.apply(_initialise)
        self.slots = nn.Parameter(torch.randn(slots, dim))  # KxC

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projector(x)
        return z, torch.einsum("kc,nchw->nkhw", F.normalize(self.slots, dim=1), unit(z))


class SlotPredictor(nn.Module):
    """An MLP of three layers on rows, of which only the valid ones determine BN statistics.

    Shape: (M, C), (M,) bool -> (M, C).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        sizes = (dim, hidden, hidden, dim)
        self.linear = nn.ModuleList(map(nn.Linear, sizes, sizes[1:]))
        self.norm = nn.ModuleList(map(NormOfValid, sizes[1:3]))
        self.apply(_initialise)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        for linear, norm in zip(self.linear, self.norm, strict=False):
            x = F.gelu(norm(linear(x), valid))
        result: Tensor = self.linear[2](x)
        return result


class NormOfValid(nn.Module):
    """Batch normalisation by the statistics of the valid rows of all ranks.

    It has no running statistics, because the predictor is used in training only.

    Shape: (M, C), (M,) bool -> (M, C).
    """

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        counted = valid[:, None].to(x.dtype)  # Mx1
        count = distributed.all_reduce_sum(counted.sum()).clamp(min=1)
        mean = comm.all_gather((counted * x).sum(0)[None]).sum(0) / count  # C
        centred = x - mean
        var = comm.all_gather((counted * centred.square()).sum(0)[None]).sum(0) / count  # C
        return centred * (var + self.eps).rsqrt() * self.weight + self.bias


def present(scores: Tensor) -> Tensor:
    """Return which slots are the most similar one of some cell. Shape: (N, K, h, w) -> (N, K)."""
    nearest = scores.detach().argmax(1).flatten(1)  # NxP
    empty = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device)
    return empty.scatter(1, nearest, True)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        assert module.bias is not None
        nn.init.zeros_(module.bias)

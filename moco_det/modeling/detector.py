"""Construction of a protocol's detector with the norms that suit the number of processes."""

import logging
import re

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from moco_common.backbone.resnet import BLOCKS_PER_STAGE
from moco_common.errors import UserError
from moco_common.text import counted

log = logging.getLogger(__name__)
NORM_KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")
STAGES = ("stem", "res2", "res3", "res4", "res5")  # as MODEL.BACKBONE.FREEZE_AT counts them
SYNCHRONISED = ("SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


def stage_of(name: str) -> str | None:
    """Return the stage of the ResNet that a parameter or module belongs to; None outside of it.

    The res5 of a C4 head is a stage like the others, but the norm that MoCo's head adds is new.
    """
    found = re.match(
        r"(?:backbone|backbone\.bottom_up|roi_heads)\.(stem|res[2-5])\.(?!norm\b)", name
    )
    return found and found[1]


def assert_all_trained(model: nn.Module, freeze_at: int = 0) -> None:
    """Check that every layer and batch norm of a model is trained.

    Args:
        freeze_at: number of stages of the backbone, from the stem on, that are frozen on purpose
            (``MODEL.BACKBONE.FREEZE_AT``).

    Raises:
        UserError: another layer is frozen; the message names the config key that froze it.
    """
    on_purpose = STAGES[:freeze_at]
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d) and stage_of(name) not in on_purpose:
            key = "FPN" if ".fpn_" in name else "RESNETS"
            raise UserError(
                f"MODEL.{key}.NORM is FrozenBN (in {name}), but fine-tuning here trains every BN: "
                "use SyncBN, naiveSyncBN or BN."
            )
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and stage_of(name) not in on_purpose
    ]
    if frozen:
        raise UserError(
            f"{counted(len(frozen), 'parameter')} would not be trained, first {frozen[0]}: choose "
            "modules that train all their parameters."
        )
    if on_purpose:
        log.info("frozen     %s of the backbone, with their BN", ", ".join(on_purpose))


def fit_norms(cfg: CfgNode, world_size: int) -> tuple[CfgNode, str | None]:
    """Replace synchronised BN by plain BN if there is only one process.

    (With several processes on CPUs, the trainer replaces torch's SyncBN by
    :func:`batch_norm.replace_sync_bn`.)

    Returns:
        A copy of the config for building the model, and a note on what was replaced, or None.
    """
    fitted = cfg.clone()
    fitted.defrost()
    replaced: dict[str, str] = {}
    for section in NORM_KEYS:
        norm = fitted.MODEL[section].NORM
        if world_size == 1 and norm in SYNCHRONISED:
            replaced[norm] = fitted.MODEL[section].NORM = "BN"
    if not replaced:
        return fitted, None
    return fitted, f"{', '.join(replaced)} -> BN (one process)"


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build the protocol's model on ``MODEL.DEVICE``, with random weights.

    Raises:
        UserError: there is no ResNet of this depth, or the protocol uses group norm and a number of
            channels is not divisible by 32.
    """
    depth = cfg.MODEL.RESNETS.DEPTH
    if depth not in BLOCKS_PER_STAGE:
        depths = ", ".join(map(str, BLOCKS_PER_STAGE))
        raise UserError(f"MODEL.RESNETS.DEPTH is {depth}: choose one of {depths}.")
    fitted, note = fit_norms(cfg, comm.get_world_size())
    if note:
        log.info("norms      %s", note)
    try:
        model: nn.Module = build_model(fitted)
    except ValueError as error:
        if "divisible by num_groups" not in str(error):
            raise
        raise UserError(
            f"{cfg.PROTOCOL or 'this config'} uses group norm with 32 groups, but this network has "
            "layers whose number of channels is not a multiple of 32: use a wider network or a "
            "protocol with batch norm."
        ) from error
    return model

"""Construction of a protocol's detector with the norms that suit the number of processes."""

import logging

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from moco_common.errors import UserError
from moco_common.text import counted

log = logging.getLogger(__name__)
NORM_KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")
SYNCHRONISED = ("SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


def assert_all_trained(model: nn.Module, freeze_at: int) -> None:
    """Check that no layer or batch norm of a model is frozen.

    Raises:
        UserError: a layer is frozen; the message names the config key that froze it.
    """
    if freeze_at != 0:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but fine-tuning here trains every layer: "
            "set it to 0."
        )
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            key = "FPN" if ".fpn_" in name else "RESNETS"
            raise UserError(
                f"MODEL.{key}.NORM is FrozenBN (in {name}), but fine-tuning here trains every BN: "
                "use SyncBN, naiveSyncBN or BN."
            )
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise UserError(
            f"{counted(len(frozen), 'parameter')} would not be trained, first {frozen[0]}: choose "
            "modules that train all their parameters."
        )


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
        UserError: the protocol uses group norm, and a number of channels is not divisible by 32.
    """
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

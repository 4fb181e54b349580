"""moco_det: from a pre-trained checkpoint to a Detectron2 detector and its report.

Importing this package imports neither torch nor Detectron2: the names below are imported when
they are first used, and the heads and backbones are registered as soon as Detectron2's registries
exist (see `moco_det.registration`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moco_common.dependencies import DETECTRON2, OPENCV, require
from moco_common.errors import UserError
from moco_det.registration import register_with_detectron2

if TYPE_CHECKING:
    from moco_det.api import Predictor, evaluate, train
    from moco_det.config.defaults import add_moco_det_config
    from moco_det.config.protocols import get_protocol, load_config, protocol_names
    from moco_det.conversion import Converted, convert, load_detectron2_weights
    from moco_det.export.export_run import export_detector
    from moco_det.modeling.roi_heads import Res5ROIHeadsExtraNorm

__all__ = [
    "Converted",
    "Predictor",
    "Res5ROIHeadsExtraNorm",
    "UserError",
    "add_moco_det_config",
    "convert",
    "evaluate",
    "export_detector",
    "get_protocol",
    "load_config",
    "load_detectron2_weights",
    "protocol_names",
    "train",
]
_MODULES = {
    "Converted": "moco_det.conversion",
    "Predictor": "moco_det.api",
    "Res5ROIHeadsExtraNorm": "moco_det.modeling.roi_heads",
    "add_moco_det_config": "moco_det.config.defaults",
    "convert": "moco_det.conversion",
    "evaluate": "moco_det.api",
    "export_detector": "moco_det.export.export_run",
    "get_protocol": "moco_det.config.protocols",
    "load_config": "moco_det.config.protocols",
    "load_detectron2_weights": "moco_det.conversion",
    "protocol_names": "moco_det.config.protocols",
    "train": "moco_det.api",
}

require("moco_det", "cv2", OPENCV)
require("moco_det", "detectron2", DETECTRON2)
register_with_detectron2()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

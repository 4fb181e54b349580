"""moco_det: from a pre-trained checkpoint to a Detectron2 detector and its report."""

import warnings

try:
    import cv2  # noqa: F401
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "moco_det needs OpenCV (cv2), which is not required by name because several packages bring "
        "it: pip install opencv-python-headless.",
        name="cv2",
    ) from None
with warnings.catch_warnings():
    # pkg_resources and torch.jit.script are Detectron2's affair: a user can do nothing about them.
    warnings.simplefilter("ignore")
    try:
        import detectron2  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ModuleNotFoundError(
            "moco_det needs Detectron2, which is not on the package index under its own name: "
            "see 'Installation' in the README (`make setup`, or build it from upstream's git "
            "repository after installing torch, with `pip install --no-build-isolation`).",
            name="detectron2",
        ) from None
    # Heads and backbone register themselves by name.
    from moco_common.errors import UserError
    from moco_det.config.defaults import add_moco_det_config
    from moco_det.config.protocols import get_protocol, load_config, protocol_names
    from moco_det.conversion import Converted, convert, load_detectron2_weights
    from moco_det.modeling import backbone, sem_seg_head  # noqa: F401
    from moco_det.modeling.roi_heads import Res5ROIHeadsExtraNorm

__all__ = [
    "Converted",
    "Res5ROIHeadsExtraNorm",
    "UserError",
    "add_moco_det_config",
    "convert",
    "get_protocol",
    "load_config",
    "load_detectron2_weights",
    "protocol_names",
]

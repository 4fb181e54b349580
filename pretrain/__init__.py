"""pretrain: from photographs to a checkpoint, by Momentum Contrast."""

try:
    import cv2  # noqa: F401
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "pretrain needs OpenCV (cv2), which is not required by name because several packages bring "
        "it: pip install opencv-python-headless.",
        name="cv2",
    ) from None

from moco_common.version import __version__

__all__ = ["__version__"]

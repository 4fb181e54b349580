"""pretrain: from photographs to a checkpoint, by Momentum Contrast."""

from moco_common.dependencies import OPENCV, require
from moco_common.version import __version__

__all__ = ["__version__"]

require("pretrain", "cv2", OPENCV)

"""pretrain: from photographs to a checkpoint, by Momentum Contrast.

Importing this package does not import torch: `train` is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

from moco_common.dependencies import OPENCV, require
from moco_common.version import __version__

if TYPE_CHECKING:
    from pretrain.api import train

__all__ = ["__version__", "train"]

require("pretrain", "cv2", OPENCV)


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pretrain import api

    return api.train


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

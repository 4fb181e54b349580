"""The converter's public names; the work is in :mod:`moco_det.conversion`.

``moco_det.convert`` is the function as soon as the package exports it: this module holds no code,
so that nothing is lost when the attribute is not the module.
"""

from moco_det.conversion import (
    CheckpointError,
    Converted,
    Proof,
    Report,
    Weights,
    convert,
    load_detectron2_weights,
)

__all__ = [
    "CheckpointError",
    "Converted",
    "Proof",
    "Report",
    "Weights",
    "convert",
    "load_detectron2_weights",
]

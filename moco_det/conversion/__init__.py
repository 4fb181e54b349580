"""Conversion of any ResNet checkpoint to Detectron2 or torchvision, with a numerical proof.

``converter.py`` runs the steps: find_encoder.py (where the encoder is, by the tables of
layouts.py), architecture.py (which ResNet it is), account_tensors.py (what happens to each tensor),
pixel_settings.py, rescale.py, weight_files.py, proof.py.
"""

from moco_common.reader.errors import CheckpointError
from moco_det.conversion.account import Entry, Report
from moco_det.conversion.converter import Converted, convert
from moco_det.conversion.proof import Proof, prove
from moco_det.conversion.weight_files import Weights, load_detectron2_weights

__all__ = [
    "CheckpointError",
    "Converted",
    "Entry",
    "Proof",
    "Report",
    "Weights",
    "convert",
    "load_detectron2_weights",
    "prove",
]

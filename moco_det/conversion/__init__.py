"""Conversion of any checkpoint of a ResNet for Detectron2 or torchvision, with a proof.

The steps, in order: layouts.py (tables of the projects' layouts), find_encoder.py (where the
encoder is), architecture.py (which ResNet it is), account_tensors.py (what becomes of each tensor),
pixel_settings.py, rescale.py, proof.py, weight_files.py; converter.py runs them.
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

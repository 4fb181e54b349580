"""Conversion of any ResNet checkpoint to Detectron2 or torchvision, with a numerical proof.

`moco_common.backbone` reads the ResNet of a file; rescale.py, proof.py and weight_files.py change,
prove and write it; converter.py runs them, and account.py holds the report.
"""

from moco_common.backbone.accounting import Entry
from moco_common.reader.errors import CheckpointError
from moco_det.conversion.account import Report
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

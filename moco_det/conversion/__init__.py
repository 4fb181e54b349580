"""Any checkpoint of a ResNet -> a file that Detectron2 or torchvision loads, with a proof.

Read in this order: sources.py (the tables), recognise.py (where the encoder is), architecture.py
(which ResNet it is), accounting.py (what becomes of every tensor), settings.py, rescale.py,
proof.py, files.py, converter.py.
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

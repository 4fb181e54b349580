"""Parts of the detector that replace Detectron2's."""

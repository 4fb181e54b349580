"""Parts of the detector that replace Detectron2's; importing them registers them by name."""

from moco_det.modeling import backbone, roi_heads, sem_seg_head

__all__ = ["backbone", "roi_heads", "sem_seg_head"]

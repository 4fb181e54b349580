"""What a protocol trains and measures: boxes, masks, keypoints, or the class of every pixel."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog

from moco_det.semantic import SemanticMapper

SEMANTIC = "SemanticSegmentor"
# The metric that stands for a task in one line of the log.
HEADLINES = ("AP", "AP50", "AP75", "mIoU", "pACC")
_KINDS = {
    "voc": ("bbox",),
    "pascal_voc": ("bbox",),
    "sem_seg": ("sem_seg",),
    "cityscapes_sem_seg": ("sem_seg",),
    "cityscapes_instance": ("segm",),
}
# One letter for a side, at an end of the name or before a capital: l_eye, eye_r, LEye.
_SIDE = re.compile(r"^[lr](?=_)|(?<=_)[lr]$|^[LR](?=_|[A-Z])|(?<=_)[LR]$")
_OTHER_SIDE = {"l": "r", "r": "l", "L": "R", "R": "L"}


def is_semantic_model(cfg: CfgNode) -> bool:
    """Whether the model gives each pixel a class, instead of finding objects."""
    return bool(cfg.MODEL.META_ARCHITECTURE == SEMANTIC)


def evaluated_tasks(cfg: CfgNode, dataset_name: str) -> tuple[str, ...]:
    """The tasks that both the model and a registered data set have.

    Returns:
        Some of "bbox", "segm" and "keypoints", or "sem_seg".
    """
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.evaluator_type
    if kind in _KINDS:
        return _KINDS[kind]
    masks = cfg.MODEL.MASK_ON and metadata.get("has_masks", True)
    keypoints = cfg.MODEL.KEYPOINT_ON and metadata.get("keypoint_names")
    return ("bbox", *(["segm"] if masks else []), *(["keypoints"] if keypoints else []))


def build_train_mapper(cfg: CfgNode) -> Callable[[dict[str, Any]], Any]:
    """What turns a record of the training set into an example for the model."""
    return SemanticMapper.from_config(cfg) if is_semantic_model(cfg) else DatasetMapper(cfg, True)


def flip_map(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which keypoints a horizontal flip swaps: those named alike but for left and right.

    ``["nose", "left_eye", "right_eye"]`` -> ``[("left_eye", "right_eye")]``; also ``eye_l`` and
    ``eye_r``, ``LEye`` and ``REye``.
    """
    known = set(names)
    pairs = []
    for name in names:
        for left, right in (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")):
            if left in name and (other := name.replace(left, right)) in known:
                pairs.append((name, other))
                break
        else:
            mirrored = _SIDE.sub(lambda side: _OTHER_SIDE[side.group()], name)
            if mirrored != name and mirrored in known and name not in {b for _, b in pairs}:
                pairs.append((name, mirrored))
    return pairs


def headline(scores: Mapping[str, Any]) -> str:
    """``"AP 40.12  AP50 61.00  AP75 43.20"``, of one task."""
    return "  ".join(f"{key} {scores[key]:.2f}" for key in HEADLINES if key in scores)


def with_classes_apart(scores: Mapping[str, float]) -> dict[str, Any]:
    """``{"AP": 40, "AP-cat": 50}`` -> ``{"AP": 40, "per_class": {"cat": 50}}``."""
    overall: dict[str, Any] = {k: v for k, v in scores.items() if "-" not in k}
    overall["per_class"] = {k.partition("-")[2]: v for k, v in scores.items() if "-" in k}
    return overall

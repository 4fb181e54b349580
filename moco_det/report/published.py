"""Published results for comparison: means in percent, all with a ResNet-50."""

from collections.abc import Mapping
from dataclasses import dataclass

from moco_det.config.protocols import split_name

MOCO = "MoCo, He et al. 2020, arXiv:1911.05722"
MOCO_DETECTION = "facebookresearch/moco, detection/README.md (means of 5 trials)"
INSTAGRAM = "MoCo v1, Instagram-1B"
ZOO = "Detectron2, MODEL_ZOO.md, new baselines"
DENSECL = "WXinlong/DenseCL, README.md (means of 5 trials)"
PIXPRO = "zdaxie/PixPro, README.md"
SLOTCON = "CVMI-Lab/SlotCon, README.md"
INFOMIN = "InfoMin, Tian et al. 2020, arXiv:2005.10243"


@dataclass(frozen=True)
class Published:
    """One row of a paper. `metrics` maps "bbox/AP", "segm/AP", ... to percent."""

    protocol: str
    dataset: str
    weights: str
    metrics: Mapping[str, float]
    source: str
    n: int | None = None  # number of trials, if stated


def published(protocol: str, dataset: str) -> list[Published]:
    """Published rows for a protocol (or any of its variants) on a data set."""
    base, _ = split_name(protocol)
    return [row for row in TABLE if (row.protocol, row.dataset) == (base, dataset)]


def _voc(
    weights: str,
    ap: float,
    ap50: float,
    ap75: float,
    source: str,
    protocol: str = "VOC",
    n: int | None = 5,
) -> Published:
    metrics = {"bbox/AP": ap, "bbox/AP50": ap50, "bbox/AP75": ap75}
    return Published(protocol, "voc_2007_test", weights, metrics, source, n)


def _coco(protocol: str, weights: str, box: float, mask: float, source: str) -> Published:
    metrics = {"bbox/AP": box, "segm/AP": mask}
    return Published(protocol, "coco_2017_val", weights, metrics, source)


def _one(
    protocol: str, dataset: str, metric: str, n: int | None, *values: float
) -> list[Published]:
    """Rows of one metric for supervised weights, MoCo v1 on ImageNet and MoCo v1 on Instagram."""
    starts = ("supervised, ImageNet", "MoCo v1, 200 epochs", INSTAGRAM)
    return [
        Published(protocol, dataset, weights, {metric: value}, MOCO, n)
        for weights, value in zip(starts, values, strict=True)
    ]


TABLE = (
    _voc("random", 33.8, 60.2, 33.1, MOCO),
    _voc("supervised, ImageNet", 53.5, 81.3, 58.8, MOCO_DETECTION),
    _voc("MoCo v1, 200 epochs", 55.9, 81.5, 62.6, MOCO_DETECTION),
    _voc("MoCo v2, 200 epochs", 57.0, 82.4, 63.6, MOCO_DETECTION),
    _voc("MoCo v2, 800 epochs", 57.4, 82.5, 64.0, MOCO_DETECTION),
    _voc(INSTAGRAM, 57.2, 82.2, 63.7, MOCO),
    Published("VOC", "voc_2007_test", "DenseCL, 200 epochs", {"bbox/AP": 58.7}, DENSECL, n=5),
    _voc("PixPro, 100 epochs", 58.8, 83.0, 66.5, PIXPRO, n=None),
    _voc("PixPro, 400 epochs", 60.2, 83.8, 67.7, PIXPRO, n=None),
    _voc("supervised, ImageNet", 42.4, 74.4, 42.7, MOCO, "VOC07"),
    _voc("MoCo v1, 200 epochs", 46.6, 74.9, 50.1, MOCO, "VOC07"),
    _voc(INSTAGRAM, 47.6, 75.6, 51.7, MOCO, "VOC07"),
    _coco("COCO-C4-1x", "supervised, ImageNet", 38.2, 33.3, MOCO),
    _coco("COCO-C4-1x", "MoCo v1, 200 epochs", 38.5, 33.6, MOCO),
    _coco("COCO-C4-1x", "MoCo v2, 200 epochs", 38.9, 34.2, INFOMIN),
    _coco("COCO-C4-1x", "PixPro, 100 epochs", 40.0, 34.8, PIXPRO),
    _coco("COCO-C4-1x", "PixPro, 400 epochs", 40.5, 35.3, PIXPRO),
    _coco("COCO-C4-2x", "supervised, ImageNet", 40.0, 34.7, MOCO),
    _coco("COCO-C4-2x", "MoCo v1, 200 epochs", 40.7, 35.4, MOCO),
    _coco("COCO-C4-2x", "MoCo v2, 200 epochs", 41.0, 35.6, INFOMIN),
    _coco("COCO-C4-2x", INSTAGRAM, 41.1, 35.6, MOCO),
    _coco("COCO-FPN-1x", "random", 31.0, 28.5, MOCO),
    _coco("COCO-FPN-1x", "supervised, ImageNet", 38.9, 35.4, MOCO),
    _coco("COCO-FPN-1x", "MoCo v1, 200 epochs", 38.5, 35.1, MOCO),
    _coco("COCO-FPN-1x", "MoCo v2, 200 epochs", 38.9, 35.5, INFOMIN),
    # Protocol of these projects: four convolutions and a norm in the heads.
    _coco("COCO-FPN-1x-4conv1fc", "random", 32.8, 29.9, PIXPRO),
    _coco("COCO-FPN-1x-4conv1fc", "supervised, ImageNet", 39.7, 35.9, PIXPRO),
    _coco("COCO-FPN-1x-4conv1fc", "MoCo v1, 200 epochs", 39.4, 35.6, PIXPRO),
    _coco("COCO-FPN-1x-4conv1fc", "MoCo v2, 800 epochs", 40.4, 36.4, PIXPRO),
    _coco("COCO-FPN-1x-4conv1fc", "PixPro, 100 epochs", 40.8, 36.8, PIXPRO),
    _coco("COCO-FPN-1x-4conv1fc", "PixPro, 400 epochs, instance branch", 41.4, 37.4, PIXPRO),
    _coco("COCO-FPN-1x-4conv1fc", "SlotCon, 200 epochs", 41.8, 37.8, SLOTCON),
    _coco("COCO-FPN-1x-4conv1fc", "SlotCon, 800 epochs of COCO", 41.0, 37.0, SLOTCON),
    _coco("COCO-FPN-2x", "random", 36.7, 33.7, MOCO),
    _coco("COCO-FPN-2x", "supervised, ImageNet", 40.6, 36.8, MOCO),
    _coco("COCO-FPN-2x", "MoCo v1, 200 epochs", 40.8, 36.9, MOCO),
    _coco("COCO-FPN-2x", "MoCo v2, 200 epochs", 40.9, 37.0, INFOMIN),
    _coco("COCO-FPN-2x", INSTAGRAM, 41.1, 37.4, MOCO),
    _coco("COCO-FPN-LSJ-100ep", "random", 44.6, 40.3, ZOO),
    _coco("COCO-FPN-LSJ-200ep", "random", 46.3, 41.7, ZOO),
    _coco("COCO-FPN-LSJ-400ep", "random", 47.4, 42.5, ZOO),
    *_one("COCO-keypoints-2x", "keypoints_coco_2017_val", "keypoints/AP", None, 65.8, 66.8, 66.9),
    # BN tuned, as here; with BN frozen the supervised weights reach 24.4.
    *_one("LVIS-FPN-2x", "lvis_v0.5_val", "segm/AP", 5, 23.2, 24.1, 24.9),
    *_one("VOC-semseg", "voc_2012_sem_seg_val", "sem_seg/mIoU", 5, 74.4, 72.5, 73.6),
    *_one("Cityscapes-semseg", "cityscapes_fine_sem_seg_val", "sem_seg/mIoU", 5, 74.6, 75.3, 75.5),
)

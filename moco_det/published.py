"""The papers' numbers, to stand beside ours: means in percent, ResNet-50 throughout."""

from collections.abc import Mapping
from dataclasses import dataclass

from moco_det.protocols import split_name

MOCO = "MoCo, He et al. 2020, arXiv:1911.05722"
MOCO_DETECTION = "facebookresearch/moco, detection/README.md (means of 5 trials)"
INFOMIN = "InfoMin, Tian et al. 2020, arXiv:2005.10243"

# What the spread over five trials is on VOC, by the same README: about 0.2 AP, 0.2 AP50, 0.4 AP75.


@dataclass(frozen=True)
class Published:
    """One row of a paper. `metrics` maps "bbox/AP", "segm/AP", ... to percent."""

    protocol: str
    dataset: str
    weights: str
    metrics: Mapping[str, float]
    source: str
    n: int | None = None  # trials, where the source says so


def published(protocol: str, dataset: str) -> list[Published]:
    """The rows for this protocol (any sibling) on this data set; [] where nothing is published."""
    base, _ = split_name(protocol)
    return [row for row in TABLE if (row.protocol, row.dataset) == (base, dataset)]


def _voc(weights: str, ap: float, ap50: float, ap75: float, source: str) -> Published:
    metrics = {"bbox/AP": ap, "bbox/AP50": ap50, "bbox/AP75": ap75}
    return Published("VOC", "voc_2007_test", weights, metrics, source, n=5)


def _coco(protocol: str, weights: str, box: float, mask: float, source: str) -> Published:
    metrics = {"bbox/AP": box, "segm/AP": mask}
    return Published(protocol, "coco_2017_val", weights, metrics, source)


TABLE = (
    _voc("random", 33.8, 60.2, 33.1, MOCO),
    _voc("supervised, ImageNet", 53.5, 81.3, 58.8, MOCO_DETECTION),
    _voc("MoCo v1, 200 epochs", 55.9, 81.5, 62.6, MOCO_DETECTION),
    _voc("MoCo v2, 200 epochs", 57.0, 82.4, 63.6, MOCO_DETECTION),
    _voc("MoCo v2, 800 epochs", 57.4, 82.5, 64.0, MOCO_DETECTION),
    _coco("COCO-C4-1x", "supervised, ImageNet", 38.2, 33.3, MOCO),
    _coco("COCO-C4-1x", "MoCo v1, 200 epochs", 38.5, 33.6, MOCO),
    _coco("COCO-C4-1x", "MoCo v2, 200 epochs", 38.9, 34.2, INFOMIN),
    _coco("COCO-C4-2x", "supervised, ImageNet", 40.0, 34.7, MOCO),
    _coco("COCO-C4-2x", "MoCo v1, 200 epochs", 40.7, 35.4, MOCO),
    _coco("COCO-C4-2x", "MoCo v2, 200 epochs", 41.0, 35.6, INFOMIN),
    _coco("COCO-FPN-1x", "random", 31.0, 28.5, MOCO),
    _coco("COCO-FPN-1x", "supervised, ImageNet", 38.9, 35.4, MOCO),
    _coco("COCO-FPN-1x", "MoCo v1, 200 epochs", 38.5, 35.1, MOCO),
    _coco("COCO-FPN-1x", "MoCo v2, 200 epochs", 38.9, 35.5, INFOMIN),
    _coco("COCO-FPN-2x", "random", 36.7, 33.7, MOCO),
    _coco("COCO-FPN-2x", "supervised, ImageNet", 40.6, 36.8, MOCO),
    _coco("COCO-FPN-2x", "MoCo v1, 200 epochs", 40.8, 36.9, MOCO),
    _coco("COCO-FPN-2x", "MoCo v2, 200 epochs", 40.9, 37.0, INFOMIN),
)

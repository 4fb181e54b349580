"""Large-scale jitter: the augmentation of Detectron2's own baseline, with boxes of what is left."""

import random

import cv2
import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from moco_det.config.protocols import get_protocol
from moco_det.data.dataset_mapper import build_test_mapper, build_train_mapper

pytest.importorskip("shapely", reason="pip install shapely")


@pytest.fixture
def record(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    triangle = {"segmentation": [[20.0, 10.0, 120.0, 40.0, 30.0, 80.0]], "category_id": 0}
    triangle |= {"bbox": [20, 10, 120, 80], "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
    return {
        "file_name": str(tmp_path / "a.png"), "height": 90, "width": 140, "image_id": 0,
        "annotations": [triangle],
    }  # fmt: skip


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def test_images_are_those_of_detectron2s_baseline(record):
    lazy = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    augmentations = [instantiate(a) for a in lazy.dataloader.train.mapper.augmentations]
    mapper = build_train_mapper(get_protocol("COCO-FPN-LSJ-100ep"))
    pixels = cv2.imread(record["file_name"])[:, :, ::-1]
    for number in range(5):
        seed(number)
        example = T.AugInput(pixels.copy())
        T.AugmentationList(augmentations)(example)
        seed(number)
        found = mapper(record)["image"].numpy().transpose(1, 2, 0)
        assert found.shape == (1024, 1024, 3)
        assert np.array_equal(found, example.image)


def test_boxes_are_those_of_the_part_that_the_crop_leaves(record):
    """Against the masks, drawn: each box is that of the polygon's pixels, to a pixel."""
    cfg = get_protocol("COCO-FPN-LSJ-100ep")
    cfg.merge_from_list(["INPUT.JITTER_SIZE", 200])
    mapper, seen, scales = build_train_mapper(cfg), 0, set()
    for number in range(12):
        seed(number)
        instances = mapper(record)["instances"]
        for polygons, box in zip(instances.gt_masks.polygons, instances.gt_boxes, strict=True):
            mask = np.zeros((200, 200), np.uint8)
            for polygon in polygons:
                cv2.fillPoly(mask, [polygon.reshape(-1, 1, 2).round().astype(np.int32)], 1)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            expected = [columns[0], rows[0], columns[-1], rows[-1]]
            assert box.tolist() == pytest.approx(expected, abs=1.5)
            seen += 1
            scales.add(round(float(box[2] - box[0]), -1))
    assert seen >= 8
    assert len(scales) >= 4


def test_the_test_images_are_not_jittered(record):
    mapper = build_test_mapper(get_protocol("COCO-FPN-LSJ-100ep"))
    assert mapper(record)["image"].shape == (3, 800, 1244)

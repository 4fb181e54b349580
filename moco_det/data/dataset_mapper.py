"""Mappers from records of a data set to inputs of the model."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from PIL import Image

from moco_common.dependencies import require
from moco_common.images import check_picture, open_picture, orientation, read_picture
from moco_det.config.defaults import is_semantic_model
from moco_det.data.datasets.label_files import read_labels

SHAPELY = "shapely, which cuts polygons: pip install shapely."


class RandomScale(T.Augmentation):
    """Resize by a factor drawn from [smallest, largest]; labels by nearest neighbour."""

    def __init__(self, smallest: float, largest: float) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The transform of an (H, W, C) image."""
        height, width = image.shape[:2]
        scale = np.random.uniform(self.smallest, self.largest)
        return T.ResizeTransform(
            height, width, max(round(height * scale), 1), max(round(width * scale), 1)
        )


class SemanticMapper:
    """Mapper from a record with pixel labels to a training example.

    Detectron2's ``DatasetMapper`` would read the colours of a palette as labels.

    Args:
        augmentations: applied to image and labels together.
        image_format: "RGB" or "BGR".
    """

    def __init__(self, augmentations: list[T.Augmentation], image_format: str) -> None:
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "SemanticMapper":
        """Scale by ``INPUT.SCALE_TRAIN``, crop to ``INPUT.CROP.SIZE``, flip.

        Images smaller than the crop are padded after normalisation, when the batch is assembled:
        with the mean colour, and with ignored labels.
        """
        smallest, largest = cfg.INPUT.SCALE_TRAIN
        augmentations: list[T.Augmentation] = [
            RandomScale(smallest, largest),
            T.FixedSizeCrop(tuple(map(int, cfg.INPUT.CROP.SIZE)), pad=False),
        ]
        if cfg.INPUT.RANDOM_FLIP != "none":
            vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
            augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
        return cls(augmentations, cfg.INPUT.FORMAT)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """``image`` (3, H, W) uint8 and ``sem_seg`` (H, W) int64 beside the record's own keys."""
        image = read_picture(record["file_name"], self.image_format)
        detection_utils.check_image_size(record, image)
        labels = read_labels(record["sem_seg_file_name"])
        example = T.AugInput(image, sem_seg=labels.astype(np.uint8))
        self.augmentations(example)
        pixels = np.ascontiguousarray(example.image.transpose(2, 0, 1))
        return {
            **record,
            "image": torch.as_tensor(pixels),
            "sem_seg": torch.as_tensor(example.sem_seg.astype(np.int64)),
        }


class CheckedMapper(DatasetMapper):
    """Detectron2's mapper, for pictures that `moco_common.images` accepts.

    Detectron2 opens a picture in any format that Pillow knows, and silently clips one of more than
    8 bits a channel. Maps of the pixels' classes are not read: `SemanticMapper` does that, and the
    evaluator.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the arguments of ``DatasetMapper``, with large-scale jitter if it is configured.

        Large-scale jitter (Ghiasi et al. 2021, "Simple Copy-Paste", section 3) scales an image by a
        factor from a wide range, and crops or pads it to a square.
        """
        arguments: dict[str, Any] = super().from_config(cfg, is_train)
        side = cfg.INPUT.JITTER_SIZE
        if is_train and side:
            require("large-scale jitter", "shapely", SHAPELY)
            flips = [a for a in arguments["augmentations"] if isinstance(a, T.RandomFlip)]
            smallest, largest = cfg.INPUT.JITTER_RANGE
            scale = T.ResizeScale(smallest, largest, target_height=side, target_width=side)
            arguments["augmentations"] = [scale, T.FixedSizeCrop((side, side)), *flips]
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON  # from the part that is left
        return arguments

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Check the picture of a record and map it; see ``DatasetMapper``."""
        check_picture(record["file_name"])
        record = {key: value for key, value in record.items() if key != "sem_seg_file_name"}
        with _turned_once(record["file_name"]) as path:
            example: dict[str, Any] = super().__call__({**record, "file_name": path})
        return {**example, "file_name": record["file_name"]}


@contextmanager
def _turned_once(path: str) -> Iterator[str]:
    """Yield the path of a picture that Detectron2's ``read_image`` turns as its EXIF tag says.

    Pillow turns a TIFF when it is loaded, and ``read_image`` would turn it again: such a picture
    is read here and handed over in another format.
    """
    with open_picture(path) as image:
        twice = image.format == "TIFF" and orientation(image) != 1
    if not twice:
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".ppm") as file:
        Image.fromarray(read_picture(path)).save(file, format="PPM")
        file.flush()
        yield file.name


def build_train_mapper(cfg: CfgNode) -> Callable[[dict[str, Any]], Any]:
    """Return the function that turns a record of the training set into a training example."""
    return SemanticMapper.from_config(cfg) if is_semantic_model(cfg) else CheckedMapper(cfg, True)


def build_test_mapper(cfg: CfgNode) -> CheckedMapper:
    """Return the function that turns a record of the test set into an input of the model.

    ``CheckedMapper(cfg, False)`` would look up the keypoints of the training set, which an
    evaluation alone does not read.
    """
    return CheckedMapper(
        False,
        augmentations=detection_utils.build_augmentation(cfg, False),
        image_format=cfg.INPUT.FORMAT,
    )

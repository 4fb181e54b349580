"""A trained detector on images of one's own: boxes, masks, pictures and one JSON file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_codec
from torch import nn

from moco_det.detector import build_detector
from moco_det.errors import UserError
from moco_det.files import replace_text
from moco_det.objects import Objects
from moco_det.pictures import save_picture
from moco_det.protocols import load_config
from moco_det.voc import IMAGE_SUFFIXES
from moco_det.weights import load_detector, read_detector


class Detector:
    """A model for single images of any size.

    Args:
        model: a Detectron2 detector; it is put into evaluation mode.
        class_names: names in the order of the classifier.
        image_format: "RGB" or "BGR", the order of channels that the model was trained with.
        short_side: to which images are resized, with `long_side` as the limit of the other side;
            0 leaves them as they are.
        threshold: least score of what is returned.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        image_format: str = "RGB",
        short_side: int = 800,
        long_side: int = 1333,
        threshold: float = 0.5,
    ) -> None:
        self.model = model.eval()
        self.class_names = list(class_names)
        self.image_format = image_format
        self.resize = ResizeShortestEdge(short_side, long_side)
        self.threshold = threshold

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.uint8]) -> Objects:
        """The objects of an RGB image (H, W, 3), by falling score."""
        height, width = image.shape[:2]
        ordered = image if self.image_format == "RGB" else image[:, :, ::-1]
        resized = self.resize.get_transform(ordered).apply_image(ordered)
        pixels = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))).float()
        (output,) = self.model([{"image": pixels, "height": height, "width": width}])
        found = output["instances"].to("cpu")
        objects = Objects(
            found.pred_boxes.tensor.numpy(),
            found.pred_classes.numpy(),
            found.scores.numpy(),
            found.pred_masks.numpy() if found.has("pred_masks") else None,
        )
        return objects.select(np.flatnonzero(objects.scores_or_zero() >= self.threshold))


def build_predictor(cfg: CfgNode, weights: str | Path, threshold: float = 0.5) -> Detector:
    """The detector of a config, filled from a checkpoint of a whole detector.

    Runs on `MODEL.DEVICE`, or on the CPU where that is a GPU and there is none.

    Raises:
        UserError: unreadable weights, or weights of another detector.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold is {threshold}, but scores lie between 0 and 1")
    cfg = cfg.clone()
    cfg.defrost()
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    # The heads drop what scores less, before the (costly) masks are drawn.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
    tensors = read_detector(weights)["model"]
    model = build_detector(cfg)
    load_detector(model, tensors, source=str(weights))
    return Detector(
        model,
        class_names(cfg),
        cfg.INPUT.FORMAT,
        cfg.INPUT.MIN_SIZE_TEST,
        cfg.INPUT.MAX_SIZE_TEST,
        threshold,
    )


def predictor_of_run(run: str | Path, threshold: float = 0.5) -> Detector:
    """The detector of a fine-tuning run: its config.yaml and model_final.pth.

    Raises:
        UserError: one of the files is missing or unreadable.
    """
    config, weights = Path(run) / "config.yaml", Path(run) / "model_final.pth"
    for file in (config, weights):
        if not file.is_file():
            raise UserError(
                f"{run} has no {file.name}: is it the directory of a fine-tuning run that has "
                "finished? Other checkpoints go with --config and --weights"
            )
    return build_predictor(load_config(str(config)), weights, threshold)


def class_names(cfg: CfgNode) -> list[str]:
    """Names of the classifier's classes: the config's own, its data set's, else `class 0`, ..."""
    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(cfg.DATASETS.CLASSES) == count:
        return list(cfg.DATASETS.CLASSES)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        names = MetadataCatalog.get(name).get("thing_classes") if name in MetadataCatalog else None
        if names is not None and len(names) == count:
            return list(names)
    return [f"class {index}" for index in range(count)]


def find_images(paths: Sequence[str | Path]) -> list[tuple[Path, Path]]:
    """Images by (file, name of its picture): files as they are, folders with all below them.

    Names are relative to the folder given and unique; a file that is no image is tried all the
    same, so that the user hears of it.

    Raises:
        UserError: a path does not exist, or there is no image at all.
    """
    found: list[tuple[Path, Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            found += [(p, p.relative_to(path)) for p in inside if p.is_file()]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise UserError(f"there is no image or folder {path}")
    if not found:
        kinds = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise UserError(f"no image in {', '.join(map(str, paths))} (looked for {kinds})")
    taken: set[Path] = set()
    named = []
    for file, name in dict(found).items():
        picture, number = name.with_suffix(".png"), 2
        while picture in taken:
            picture = name.with_name(f"{name.stem}-{number}.png")
            number += 1
        taken.add(picture)
        named.append((file, picture))
    return named


def predict(
    detector: Detector, images: Sequence[tuple[Path, Path]], folder: str | Path
) -> Iterator[tuple[Path, int | None, str | None]]:
    """Detect in each image, draw it into `folder`, and write predictions.json at the end.

    predictions.json is COCO's layout: `images`, `categories` and `annotations` (with `score`,
    `category_name`, box as x y width height, masks as run lengths), and `failed`.

    Yields:
        (file, number of objects, None), or (file, None, what is wrong with it).
    """
    folder = Path(folder)
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for file, picture in images:
        try:
            image = load_image(file)
        except UserError as error:
            failed.append({"file_name": str(file), "error": str(error)})
            yield file, None, str(error)
            continue
        objects = detector(image)
        save_picture(image, objects, detector.class_names, folder / picture)
        height, width = image.shape[:2]
        listed.append(
            {"id": len(listed) + 1, "file_name": str(file), "picture": str(picture),
             "width": width, "height": height}
        )  # fmt: skip
        for annotation in _annotations(objects, detector.class_names):
            number = {"id": len(annotations) + 1, "image_id": len(listed)}
            annotations.append({**number, **annotation})
        yield file, len(objects), None
    names = enumerate(detector.class_names)
    content = {
        "images": listed,
        "categories": [{"id": index, "name": name} for index, name in names],
        "annotations": annotations,
        "failed": failed,
    }
    replace_text(folder / "predictions.json", json.dumps(content) + "\n")


def load_image(file: str | Path) -> NDArray[np.uint8]:
    """An image as RGB (H, W, 3) uint8, turned as its EXIF tag says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_image(str(file), "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, cv2.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is not readable as an image ({reason})") from error


def _annotations(objects: Objects, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for index, (x0, y0, x1, y1) in enumerate(objects.boxes.tolist()):
        category = int(objects.classes[index])
        annotation: dict[str, Any] = {
            "category_id": category,
            "category_name": names[category],
            "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(float(objects.scores_or_zero()[index]), 4),
        }
        if objects.masks is not None:
            mask = np.asfortranarray(objects.masks[index].astype(np.uint8))
            code = mask_codec.encode(mask)
            size = [int(side) for side in code["size"]]
            annotation["segmentation"] = {"size": size, "counts": code["counts"].decode()}
        yield annotation

"""A trained detector on one's own images and videos: boxes, masks, pictures and one JSON file."""

import json
from collections.abc import Iterator, Mapping, Sequence
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

from moco_det.checkpoint import newest_checkpoints
from moco_det.detector import build_detector
from moco_det.errors import UserError
from moco_det.files import replace_text
from moco_det.objects import Objects
from moco_det.pictures import save_picture
from moco_det.protocols import load_config
from moco_det.video import (
    VIDEO_SUFFIXES,
    VideoFile,
    draw_on_frame,
    is_video,
    read_frames,
    video_facts,
)
from moco_det.voc import IMAGE_SUFFIXES
from moco_det.weights import load_detector, read_detector

SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES


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
    """The detector of a fine-tuning run: its config.yaml and its last checkpoint.

    That is model_final.pth or, of a run that is not finished, the one that it would go on from.

    Raises:
        UserError: one of the files is missing or unreadable.
    """
    config, weights = Path(run) / "config.yaml", Path(run) / "model_final.pth"
    if not weights.is_file():
        weights = next(iter(newest_checkpoints(run)), weights)
    for file in (config, weights):
        if not file.is_file():
            raise UserError(
                f"{run} has no {file.name}: is it the directory of a fine-tuning run? Other "
                "checkpoints go with --config and --weights"
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
    """Images and videos by (file, name of its picture): files, and all that is below folders.

    Names are relative to the folder given and unique; a file that is no image is tried all the
    same, so that the user hears of it.

    Raises:
        UserError: a path does not exist, or there is no image at all.
    """
    found: list[tuple[Path, Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            found += [(p, p.relative_to(path)) for p in inside if p.is_file()]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise UserError(f"there is no image, video or folder {path}")
    if not found:
        kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise UserError(f"no image or video in {', '.join(map(str, paths))} (looked for {kinds})")
    taken: set[Path] = set()
    named = []
    for file, name in dict(found).items():
        suffix, number = ".mp4" if is_video(file) else ".png", 2
        picture = name.with_suffix(suffix)
        while picture in taken:
            picture = name.with_name(f"{name.stem}-{number}{suffix}")
            number += 1
        taken.add(picture)
        named.append((file, picture))
    return named


def count_pictures(images: Sequence[tuple[Path, Path]]) -> int:
    """How many images and frames :func:`predict` will see, as far as the videos' headers tell."""
    return sum(video_facts(file)[1] if is_video(file) else 1 for file, _ in images)


def predict(
    detector: Detector, images: Sequence[tuple[Path, Path]], folder: str | Path
) -> Iterator[tuple[Path, int | None, str | None]]:
    """Detect in each image and frame, draw it into `folder`, and write predictions.json at the end.

    predictions.json is COCO's layout: `images` (frames have a `frame` number and a `time` in
    seconds), `categories` and `annotations` (with `score`, `category_name`, box as x y width
    height, masks as run lengths), and `failed`.

    Yields:
        (file, number of objects, None) for each image and frame, or (file, None, what is wrong).
    """
    folder = Path(folder)
    found = _Predictions(detector.class_names)
    for file, picture in images:
        try:
            if is_video(file):
                yield from _predict_video(detector, file, picture, folder, found)
                continue
            image = load_image(file)
        except UserError as error:
            found.fail(file, error)
            yield file, None, str(error)
            continue
        objects = detector(image)
        save_picture(image, objects, detector.class_names, folder / picture)
        found.add(file, picture, image, objects)
        yield file, len(objects), None
    replace_text(folder / "predictions.json", json.dumps(found.content()) + "\n")


def _predict_video(
    detector: Detector, file: Path, picture: Path, folder: Path, found: "_Predictions"
) -> Iterator[tuple[Path, int | None, str | None]]:
    rate, _ = video_facts(file)
    with VideoFile(folder / picture, rate) as drawn:
        for number, frame in enumerate(read_frames(file)):
            objects = detector(frame)
            drawn.add(draw_on_frame(frame, objects, detector.class_names))
            place = {"frame": number, "time": round(number / rate, 4)}
            found.add(file, picture, frame, objects, place)
            yield file, len(objects), None


class _Predictions:
    """What goes into predictions.json."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = class_names
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []

    def add(
        self,
        file: Path,
        picture: Path,
        image: NDArray[np.uint8],
        objects: Objects,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        height, width = image.shape[:2]
        entry = {"id": len(self.images) + 1, "file_name": str(file), "picture": str(picture)}
        self.images.append({**entry, "width": width, "height": height, **(more or {})})
        for annotation in _annotations(objects, self.class_names):
            number = {"id": len(self.annotations) + 1, "image_id": len(self.images)}
            self.annotations.append({**number, **annotation})

    def fail(self, file: Path, error: UserError) -> None:
        self.failed.append({"file_name": str(file), "error": str(error)})

    def content(self) -> dict[str, Any]:
        categories = [{"id": index, "name": name} for index, name in enumerate(self.class_names)]
        return {
            "images": self.images,
            "categories": categories,
            "annotations": self.annotations,
            "failed": self.failed,
        }


def load_image(file: str | Path) -> NDArray[np.uint8]:
    """An image as RGB (H, W, 3) uint8, turned as its EXIF tag says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        image: NDArray[np.uint8] = read_image(str(file), "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, cv2.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is not readable as an image ({reason})") from error
    return image


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

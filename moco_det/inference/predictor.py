"""Trained models for single images: detectors and semantic segmentation models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from numpy.typing import NDArray
from torch import Tensor, nn

from moco_common.errors import UserError
from moco_common.images import DecodeError, read_picture
from moco_common.progress import silent
from moco_common.text import counted
from moco_det.checkpoint.detector_weights import load_detector, read_detector
from moco_det.checkpoint.run_checkpointer import newest_checkpoints
from moco_det.config.defaults import is_semantic_model
from moco_det.config.protocols import load_config
from moco_det.data.datasets.image_files import IMAGE_SUFFIXES
from moco_det.inference.drawings import drawings_near
from moco_det.inference.video import VIDEO_SUFFIXES, is_video, video_facts
from moco_det.modeling.detector import build_detector
from moco_det.structures.label_map import MOST_CLASSES, UNLABELLED, LabelMap
from moco_det.structures.objects import Objects

SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES


class _Model:
    """A model for single images of any size.

    Args:
        model: a Detectron2 model; it is put into evaluation mode.
        class_names: names in the order of the classifier.
        image_format: "RGB" or "BGR", the channel order the model was trained with.
        short_side: size to which the shorter side of an image is resized; 0 for no resizing.
        long_side: limit of the longer side.
        threshold: lowest score returned.
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

    def run(self, image: NDArray[np.uint8]) -> dict[str, Any]:
        """Return the model's output for an RGB image (H, W, 3).

        Raises:
            UserError: the image is so thin that nothing of it is left when it is resized.
        """
        height, width = image.shape[:2]
        ordered = image if self.image_format == "RGB" else image[:, :, ::-1]
        transform = self.resize.get_transform(ordered)
        if 0 in (getattr(transform, "new_h", 1), getattr(transform, "new_w", 1)):
            raise UserError(
                f"{width} x {height} pixels are too thin: resized to at most "
                f"{self.resize.max_size} pixels, the shorter side vanishes"
            )
        resized = transform.apply_image(ordered)
        pixels = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))).float()
        (output,) = self.model([{"image": pixels, "height": height, "width": width}])
        return dict(output)


class Detector(_Model):
    """A detector, which returns objects."""

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.uint8]) -> Objects:
        """Detect objects in an RGB image (H, W, 3), in order of decreasing score."""
        found = self.run(image)["instances"].to("cpu")
        objects = Objects(
            found.pred_boxes.tensor.numpy(),
            found.pred_classes.numpy(),
            found.scores.numpy(),
            found.pred_masks.numpy() if found.has("pred_masks") else None,
        )
        return objects.select(np.flatnonzero(objects.scores_or_zero() >= self.threshold))


class Segmenter(_Model):
    """A semantic segmentation model, which returns a label map."""

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.uint8]) -> LabelMap:
        """Label an RGB image (H, W, 3); pixels below the threshold are unlabelled."""
        logits: Tensor = self.run(image)["sem_seg"]  # C x H x W
        scores, classes = logits.float().softmax(0).max(0)  # H x W
        classes = classes.to(torch.uint8).masked_fill(scores < self.threshold, UNLABELLED)
        return LabelMap(classes.cpu().numpy(), scores.cpu().numpy())


def build_predictor(
    cfg: CfgNode, weights: str | Path, threshold: float | None = None
) -> Detector | Segmenter:
    """Build the model of a config and load the checkpoint of a whole model.

    The model runs on `MODEL.DEVICE`, or on the CPU if that is a GPU and none is available.

    Args:
        threshold: lowest score; default: 0.5 for objects, 0 for pixels.

    Raises:
        UserError: the weights are unreadable or belong to another model.
    """
    semantic = is_semantic_model(cfg)
    if threshold is None:
        threshold = 0.0 if semantic else 0.5
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold is {threshold}, but scores lie between 0 and 1")
    names = class_names(cfg)
    if semantic and len(names) > MOST_CLASSES:
        raise UserError(
            f"the model has {len(names)} classes of pixels, but a label file holds {MOST_CLASSES}"
        )
    cfg = cfg.clone()
    cfg.defrost()
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    # The heads drop what scores less, before the (costly) masks are drawn.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
    tensors = read_detector(weights)["model"]
    model = build_detector(cfg)
    load_detector(model, tensors, source=str(weights))
    return (Segmenter if semantic else Detector)(
        model,
        names,
        cfg.INPUT.FORMAT,
        cfg.INPUT.MIN_SIZE_TEST,
        cfg.INPUT.MAX_SIZE_TEST,
        threshold,
    )


def predictor_of_run(run: str | Path, threshold: float | None = None) -> Detector | Segmenter:
    """Build the model of a fine-tuning run from its config.yaml and its last checkpoint.

    The checkpoint is model_final.pth or, for an unfinished run, the one it would resume from.

    Raises:
        UserError: a file is missing or unreadable.
    """
    config, weights = Path(run) / "config.yaml", Path(run) / "model_final.pth"
    if not weights.is_file():
        weights = next(iter(newest_checkpoints(run)), weights)
    for file in (config, weights):
        if not file.is_file():
            raise UserError(
                f"{run} has no {file.name}: pass the directory of a fine-tuning run, or any other "
                "checkpoint with --config and --weights"
            )
    return build_predictor(load_config(str(config)), weights, threshold)


def class_names(cfg: CfgNode) -> list[str]:
    """Class names by index: of the config, else of its data set, else `class 0`, ..."""
    semantic = is_semantic_model(cfg)
    count = cfg.MODEL["SEM_SEG_HEAD" if semantic else "ROI_HEADS"].NUM_CLASSES
    key = "stuff_classes" if semantic else "thing_classes"
    if len(cfg.DATASETS.CLASSES) == count:
        return list(cfg.DATASETS.CLASSES)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        names = MetadataCatalog.get(name).get(key) if name in MetadataCatalog else None
        if names is not None and len(names) == count:
            return list(names)
    return [f"class {index}" for index in range(count)]


def find_images(
    paths: Sequence[str | Path], say: Callable[[str], None] = silent
) -> list[tuple[Path, Path]]:
    """List (file, name of its picture) for image and video files, and for all those below folders.

    Names are unique and relative to the given folder. What earlier predictions drew is left out,
    which `say` reports.
    Files passed by name are listed whatever their suffix, so that a wrong one is reported.

    Raises:
        UserError: a path does not exist, or there is no image.
    """
    found: list[tuple[Path, Path]] = []
    given = list(map(Path, paths))
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            found += [(p, p.relative_to(path)) for p in inside if p.is_file()]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise UserError(f"there is no image, video or folder {path}")
    own = drawings_near(given)
    photos = {file: name for file, name in found if file.resolve() not in own}
    if not photos:
        kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        less = "; drawings of earlier predictions do not count" if found else ""
        where = ", ".join(map(str, paths))
        raise UserError(f"no image or video in {where} (looked for {kinds}{less})")
    if len(photos) < len({file for file, _ in found}):
        drawn = counted(len({file for file, _ in found}) - len(photos), "file")
        say(f"{drawn} left out, drawn by earlier predictions")
    taken: set[Path] = set()
    named = []
    for file, name in photos.items():
        suffix, number = ".mp4" if is_video(file) else ".png", 2
        picture = name.with_suffix(suffix)
        while picture in taken:
            picture = name.with_name(f"{name.stem}-{number}{suffix}")
            number += 1
        taken.add(picture)
        named.append((file, picture))
    return named


def count_pictures(images: Sequence[tuple[Path, Path]]) -> int:
    """Count images and frames, by the headers of the videos."""
    return sum(video_facts(file)[1] if is_video(file) else 1 for file, _ in images)


def load_image(file: str | Path) -> NDArray[np.uint8]:
    """Read an image as RGB (H, W, 3) uint8, rotated according to its EXIF tag.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return read_picture(file)
    except (OSError, DecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is not readable as an image ({reason})") from error

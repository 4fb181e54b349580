"""Predictions of a trained model on images and videos: pictures and one JSON file."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_codec

from moco_common.errors import UserError
from moco_common.files import replace_text
from moco_det.inference.drawings import PREDICTIONS, check_replaceable, drawings
from moco_det.inference.predictor import Detector, Segmenter, load_image
from moco_det.inference.video import VideoFile, is_video, read_frames, video_facts
from moco_det.structures.label_map import LabelMap
from moco_det.structures.objects import Objects
from moco_det.visualization.detections import draw_objects, save_picture
from moco_det.visualization.label_maps import draw_labels, save_label_picture, save_labels

Found = Objects | LabelMap
LEAST_PERIOD = 10.0  # seconds between two writes of predictions.json
Progress = Iterator[tuple[Path, int | None, str | None]]


def predict(
    model: Detector | Segmenter, images: Sequence[tuple[Path, Path]], folder: str | Path
) -> Progress:
    """Run a model on images and videos, and write pictures and predictions.json to `folder`.

    predictions.json has COCO's layout: `images` (frames have a `frame` number and a `time` in
    seconds), `categories`, `annotations` (with `score`, `category_name`, boxes as x y width height,
    masks as run lengths), `failed`, and the names of all `files` drawn. For a label map there is
    one annotation per class, with its `area` and mean score, and NAME-labels.png beside the picture
    holds the class indices (`labels` in `images`). The file is written now and then, and at the
    end even of a prediction that an error ends.

    Args:
        images: (file, name of its picture) pairs, as from `find_images`.

    Yields:
        (file, number of objects or classes, None) for each image and frame, or (file, None,
        message) for a file that failed.

    Raises:
        UserError: a file would be replaced that no earlier prediction wrote.
    """
    folder = Path(folder)
    label_files = _label_files(images) if isinstance(model, Segmenter) else {}
    files = [picture for _, picture in images] + list(label_files.values())
    check_replaceable(folder, files)
    found = _Predictions(model.class_names, folder, files)
    found.save()
    try:
        for file, picture in images:
            try:
                if is_video(file):
                    yield from _predict_video(model, file, picture, folder, found)
                else:
                    image = load_image(file)
                    labels = label_files.get(picture)
                    yield file, _predict_image(model, image, file, picture, labels, found), None
            except UserError as error:
                yield file, None, found.fail(file, error)
            found.save_now_and_then()
    finally:
        found.save()


def _label_files(images: Sequence[tuple[Path, Path]]) -> dict[Path, Path]:
    """Choose unused names for the label files of the pictures."""
    taken = {picture for _, picture in images}
    chosen = {}
    for file, picture in images:
        if is_video(file):
            continue
        labels, number = picture.with_name(f"{picture.stem}-labels.png"), 2
        while labels in taken:
            labels = picture.with_name(f"{picture.stem}-labels-{number}.png")
            number += 1
        taken.add(labels)
        chosen[picture] = labels
    return chosen


def _predict_image(
    model: Detector | Segmenter,
    image: NDArray[np.uint8],
    file: Path,
    picture: Path,
    labels: Path | None,
    found: "_Predictions",
) -> int:
    """Predict, draw and record one image; return the number of objects or classes."""
    result = model(image)
    if isinstance(result, LabelMap):
        assert labels is not None
        save_label_picture(image, result, model.class_names, found.folder / picture)
        save_labels(result, len(model.class_names), found.folder / labels)
        found.add(file, picture, image, result, {"labels": str(labels)})
    else:
        save_picture(image, result, model.class_names, found.folder / picture)
        found.add(file, picture, image, result, {})
    return len(result)


def _predict_video(
    model: Detector | Segmenter, file: Path, picture: Path, folder: Path, found: "_Predictions"
) -> Progress:
    rate, _ = video_facts(file)
    with VideoFile(folder / picture, rate) as drawn:
        for number, frame in enumerate(read_frames(file)):
            result = model(frame)
            if isinstance(result, LabelMap):
                drawn.add(draw_labels(frame, result, model.class_names))
            else:
                drawn.add(draw_objects(frame, result, model.class_names))
            place = {"frame": number, "time": round(number / rate, 4)}
            found.add(file, picture, frame, result, place)
            yield file, len(result), None
            found.save_now_and_then()


class _Predictions:
    """The content of predictions.json."""

    def __init__(self, class_names: Sequence[str], folder: Path, files: Sequence[Path]) -> None:
        self.class_names = class_names
        self.folder = folder
        # Also those of earlier predictions, which stay drawings.
        self.files = sorted({*drawings(folder), *files} - {PREDICTIONS})
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []

    def add(
        self,
        file: Path,
        picture: Path,
        image: NDArray[np.uint8],
        result: Found,
        more: Mapping[str, Any],
    ) -> None:
        height, width = image.shape[:2]
        entry = {"id": len(self.images) + 1, "file_name": str(file), "picture": str(picture)}
        self.images.append({**entry, "width": width, "height": height, **more})
        found = _of_classes(result) if isinstance(result, LabelMap) else _of_objects(result)
        for annotation in found:
            annotation["category_name"] = self.class_names[annotation["category_id"]]
            number = {"id": len(self.annotations) + 1, "image_id": len(self.images)}
            self.annotations.append({**number, **annotation})

    def fail(self, file: Path, error: UserError) -> str:
        """Record a failure and return a message that names the file."""
        message = str(error) if str(file) in str(error) else f"{file}: {error}"
        self.failed.append({"file_name": str(file), "error": message})
        return message

    def content(self) -> dict[str, Any]:
        categories = [{"id": index, "name": name} for index, name in enumerate(self.class_names)]
        return {
            "images": self.images,
            "categories": categories,
            "annotations": self.annotations,
            "failed": self.failed,
            "files": list(map(str, self.files)),
        }

    def save(self) -> None:
        start = time.monotonic()
        replace_text(self.folder / PREDICTIONS, json.dumps(self.content()) + "\n")
        end = time.monotonic()
        self._next = end + max(LEAST_PERIOD, 20 * (end - start))

    def save_now_and_then(self) -> None:
        """Save, for at most a twentieth of the time."""
        if time.monotonic() >= self._next:
            self.save()


def _of_objects(objects: Objects) -> Iterator[dict[str, Any]]:
    for index, (x0, y0, x1, y1) in enumerate(objects.boxes.tolist()):
        annotation: dict[str, Any] = {
            "category_id": int(objects.classes[index]),
            "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(float(objects.scores_or_zero()[index]), 4),
        }
        if objects.masks is not None:
            annotation["segmentation"] = _run_lengths(objects.masks[index])
        yield annotation


def _of_classes(found: LabelMap) -> Iterator[dict[str, Any]]:
    for category in found.shares():
        mask = found.classes == category
        code = _run_lengths(mask)
        yield {
            "category_id": category,
            "bbox": mask_codec.toBbox(code).tolist(),
            "area": int(mask.sum()),
            "score": round(float(found.scores[mask].mean()), 4),
            "segmentation": code,
        }


def _run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    code = mask_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()}

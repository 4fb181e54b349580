"""The generated data: repeatable, and the same in both layouts."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from moco_common.errors import UserError
from moco_det.data.register import register
from moco_det.demo.scene_dataset import write_scenes
from moco_det.demo.scenes import CLASSES, Kind, draw_portrait, draw_scene, texture

COUNTS = {"unlabelled": 6, "train": 5, "test": 3}


def write(folder: Path, **kwargs: int) -> list[tuple[int, int]]:
    return list(write_scenes(folder, **COUNTS, **kwargs))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(
        b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files)
    ).hexdigest()


def test_a_seed_gives_the_same_files_whatever_the_number_of_processes(tmp_path: Path) -> None:
    for name, kwargs in {
        "a": {"seed": 1, "processes": 1},
        "b": {"seed": 1, "processes": 2},
        "c": {"seed": 2},
    }.items():
        assert write(tmp_path / name, **kwargs)[-1] == (14, 14)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_a_finished_folder_is_left_alone_and_an_unfinished_one_begun_anew(tmp_path: Path) -> None:
    write(tmp_path)
    before = digest(tmp_path)
    assert write(tmp_path) == [(14, 14)]
    (tmp_path / "scenes.json").write_text("null")
    (tmp_path / "unlabelled" / "stray.jpg").write_bytes(b"half an image")
    write(tmp_path)
    assert digest(tmp_path) == before


def test_a_folder_of_somebody_else_is_not_emptied(tmp_path: Path) -> None:
    photo = tmp_path / "voc" / "photo.jpg"
    photo.parent.mkdir()
    photo.write_bytes(b"precious")
    with pytest.raises(UserError, match="would be lost"):
        write(tmp_path)
    assert photo.read_bytes() == b"precious"


def test_both_layouts_hold_the_same_objects_and_masks_fill_their_boxes(tmp_path: Path) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    write(tmp_path)
    images = tmp_path / "voc" / "JPEGImages"
    voc = register(f"voc:{tmp_path / 'voc'}:train")
    coco = register(f"coco:{tmp_path / 'coco' / 'instances_train.json'}:{images}")
    assert set(MetadataCatalog.get(voc).thing_classes) <= set(CLASSES)
    objects = []
    for name in (voc, coco):
        classes = MetadataCatalog.get(name).thing_classes
        objects.append(
            {
                Path(record["file_name"]).name: sorted(
                    (classes[a["category_id"]], *(round(float(v), 3) for v in a["bbox"]))
                    for a in record["annotations"]
                )
                for record in DatasetCatalog.get(name)
            }
        )
    assert objects[0] == objects[1]
    content = json.loads((tmp_path / "coco" / "instances_train.json").read_text())
    for annotation in content["annotations"]:
        runs = annotation["segmentation"]
        mask = coco_mask.decode(coco_mask.frPyObjects(runs, *runs["size"]))
        rows, columns = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        assert (columns.min(), rows.min()) == (x, y)
        assert (columns.max() + 1, rows.max() + 1) == (x + w, y + h)
        assert mask.sum() == annotation["area"]


def test_scenes_are_images_with_objects_mostly_visible() -> None:
    for seed in range(8):
        image, objects = draw_scene(np.random.default_rng(seed))
        assert image.shape == (128, 128, 3)
        assert image.dtype == np.uint8
        total = np.zeros((128, 128), int)
        for scene_object in objects:
            total += scene_object.mask
        assert total.max(initial=0) <= 1  # a pixel shows one object


def test_a_portrait_is_mostly_one_object() -> None:
    image = draw_portrait(np.random.default_rng(0))
    assert image.shape == (96, 96, 3)
    assert image.std() > 40


@pytest.mark.parametrize("category", range(len(CLASSES)), ids=CLASSES)
def test_a_texture_uses_both_inks_at_its_own_period(category: int) -> None:
    pattern = texture(Kind(category, period=8.0, angle=0.0), 96, np.random.default_rng(0))
    assert pattern.min() == 0.0
    assert pattern.max() == 1.0
    assert 0.15 < pattern.mean() < 0.85
    spectrum = np.abs(np.fft.fft2(pattern - pattern.mean()))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(96), np.fft.fftfreq(96)))
    strongest = frequency.flat[spectrum.argmax()]
    assert 1 / 50 < strongest < 1 / 5  # pixels of texture: neither shading nor noise
    assert cv2.Laplacian(pattern, cv2.CV_32F).std() > 0.05

"""Tiny data in the true layouts of Detectron2's data sets, below one ``DETECTRON2_DATASETS``.

Two training and two test images each, with objects that a detector could learn.
"""

import json
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES, COCO_PERSON_KEYPOINT_NAMES
from detectron2.data.datasets.lvis_v0_5_categories import LVIS_CATEGORIES

SIZE = (48, 64)  # height, width
BOXES = ((8, 6, 30, 24), (20, 16, 56, 44))  # x1, y1, x2, y2
CITY = "ulm"
# Cityscapes' label ids and train ids, from its own table.
ROAD, CAR, PERSON = (7, 0), (26, 13), (24, 11)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 60, (*SIZE, 3), dtype=np.uint8)
    for shade, (x1, y1, x2, y2) in zip((90, 160), BOXES, strict=True):
        image[y1:y2, x1:x2] += np.uint8(shade)
    cv2.imwrite(str(path), image)


def write_coco(root: Path, *, lvis: bool = False) -> None:
    """COCO 2017 boxes, masks and keypoints; with ``lvis`` the images and files of LVIS v0.5."""
    for split, start in (("train", 0), ("val", 10)):
        images, annotations, people = [], [], []
        for image_id in range(start + 1, start + 3):
            name = f"{image_id:012d}.jpg"
            write_image(root / "coco" / f"{split}2017" / name, image_id)
            images.append({"id": image_id, "file_name": name, "height": 48, "width": 64})
            if lvis:
                url = f"http://images.cocodataset.org/{split}2017/{name}"
                judged = {"not_exhaustive_category_ids": [], "neg_category_ids": [4]}
                images[-1] |= {"coco_url": url, **judged}
            for number, (x1, y1, x2, y2) in enumerate(BOXES):
                item = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": (3, 5)[number] if lvis else (1, 18)[number],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                }
                annotations.append(item)
                points = [
                    [x1 + 1 + k % (x2 - x1 - 2), y1 + 1 + k % (y2 - y1 - 2), 2]
                    for k in range(len(COCO_PERSON_KEYPOINT_NAMES))
                ]
                people.append(
                    {
                        **item,
                        "category_id": 1,
                        "num_keypoints": len(points),
                        "keypoints": [v for point in points for v in point],
                    }
                )
        categories = [
            {"id": c["id"], "name": c["name"], "frequency": "rcf"[c["id"] % 3], "image_count": 2}
            for c in (LVIS_CATEGORIES if lvis else COCO_CATEGORIES)
            if c.get("isthing", 1)
        ]
        if lvis:
            _dump(root / f"lvis/lvis_v0.5_{split}.json", images, annotations, categories)
            continue
        folder = root / "coco/annotations"
        _dump(folder / f"instances_{split}2017.json", images, annotations, categories)
        person = [{"id": 1, "name": "person", "keypoints": list(COCO_PERSON_KEYPOINT_NAMES)}]
        _dump(folder / f"person_keypoints_{split}2017.json", images, people, person)


def _dump(path: Path, images: list, annotations: list, categories: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps({"info": {}, "licenses": [], **content}))


def write_voc(root: Path) -> None:
    """VOC 2007 trainval and test, VOC 2012 trainval, and 2012's segmentation (train_aug, val)."""
    for year, splits in (("VOC2007", ("trainval", "test")), ("VOC2012", ("trainval",))):
        base = root / year
        (base / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (base / "Annotations").mkdir(exist_ok=True)
        for seed, split in enumerate(splits):
            names = [f"{10 * seed + i:06d}" for i in range(2)]
            (base / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
            for i, name in enumerate(names):
                write_image(base / f"JPEGImages/{name}.jpg", 10 * seed + i)
                objects = "".join(
                    f"<object><name>{word}</name><difficult>0</difficult><bndbox>"
                    f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
                    "</bndbox></object>"
                    for word, (x1, y1, x2, y2) in zip(("dog", "car"), BOXES, strict=True)
                )
                (base / f"Annotations/{name}.xml").write_text(
                    f"<annotation><filename>{name}.jpg</filename><size><width>64</width>"
                    f"<height>48</height><depth>3</depth></size>{objects}</annotation>"
                )
    base = root / "VOC2012"
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "SegmentationClassAug").mkdir()
    for seed, split in ((20, "train_aug"), (30, "val")):
        names = [f"2012_{seed + i:06d}" for i in range(2)]
        (base / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            write_image(base / f"JPEGImages/{name}.jpg", seed + i)
            labels = np.zeros(SIZE, np.uint8)
            for value, (x1, y1, x2, y2) in zip((12, 7), BOXES, strict=True):
                labels[y1:y2, x1:x2] = value
                labels[y1, x1:x2] = 255  # the border that VOC does not count
            cv2.imwrite(str(base / f"SegmentationClassAug/{name}.png"), labels)


def write_cityscapes(root: Path) -> None:
    """leftImg8bit and gtFine: polygons, instanceIds, labelIds and labelTrainIds."""
    for split, start in (("train", 0), ("val", 10)):
        for i in range(2):
            name = f"{CITY}_{start + i:06d}_000019"
            write_image(
                root / f"cityscapes/leftImg8bit/{split}/{CITY}/{name}_leftImg8bit.png", start + i
            )
            folder = root / f"cityscapes/gtFine/{split}/{CITY}"
            folder.mkdir(parents=True, exist_ok=True)
            ids, train_ids, instances = (np.full(SIZE, v, np.uint16) for v in (*ROAD, ROAD[0]))
            frame = [[0, 0], [63, 0], [63, 47], [0, 47]]
            objects = [{"label": "road", "polygon": frame}]
            pairs = zip((PERSON, CAR), ("person", "car"), BOXES, strict=True)
            for number, ((label, train), word, (x1, y1, x2, y2)) in enumerate(pairs):
                ids[y1:y2, x1:x2] = label
                train_ids[y1:y2, x1:x2] = train
                instances[y1:y2, x1:x2] = label * 1000 + number
                corners = [[x1, y1], [x2 - 1, y1], [x2 - 1, y2 - 1], [x1, y2 - 1]]
                objects.append({"label": word, "polygon": corners})
            train_ids[:2] = 255
            start_of = folder / f"{name}_gtFine"
            cv2.imwrite(f"{start_of}_labelIds.png", ids.astype(np.uint8))
            cv2.imwrite(f"{start_of}_labelTrainIds.png", train_ids.astype(np.uint8))
            cv2.imwrite(f"{start_of}_instanceIds.png", instances)
            content = {"imgHeight": 48, "imgWidth": 64, "objects": objects}
            Path(f"{start_of}_polygons.json").write_text(json.dumps(content))

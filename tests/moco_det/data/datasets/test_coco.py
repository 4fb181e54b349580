"""The COCO reader: against Detectron2's on clean data, and by name on what is wrong."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from detectron2.data.detection_utils import (
    annotations_to_instances,
    create_keypoint_hflip_indices,
    read_image,
)
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as coco_mask

import moco_det  # noqa: F401
from moco_common.errors import UserError
from moco_det.data.register import dataset_report, register, write_findings

WIDTH, HEIGHT = 64, 48
SQUARE = [10, 20, 30, 20, 30, 40, 10, 40]


def rle(box, compressed=True):
    """RLE of a filled box (x0, y0, x1, y1)."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 1
    if compressed:
        encoded = coco_mask.encode(pixels)
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    flat = np.concatenate([[0], pixels.ravel(order="F"), [2]])
    changes = np.flatnonzero(np.diff(flat))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(changes, prepend=0).tolist()}


class File:
    """A COCO file that a test fills image by image."""

    def __init__(self, root):
        self.root = root
        (root / "images").mkdir(parents=True)
        self.content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 3, "name": "cat"}, {"id": 12, "name": "dog"}],
        }

    def add(self, image_id, *objects, image=None, path=None, exif=None, **entry):
        name = f"{image_id}.png"
        path = self.root / "images" / (path or name)
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"exif": exif} if exif else {}
        (image or Image.new("L", (WIDTH, HEIGHT))).save(path, **options)
        entry = {"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT, **entry}
        self.content["images"].append(entry)
        for item in objects:
            number = len(self.content["annotations"]) + 1
            item = {"id": number, "image_id": image_id, "category_id": 3, **item}
            self.content["annotations"].append(item)

    @property
    def spec(self):
        return f"coco:{self.root / 'own.json'}:{self.root / 'images'}"

    def register(self, **options):
        (self.root / "own.json").write_text(json.dumps(self.content))
        return register(self.spec, **options)

    def read(self, **options):
        """(records by image id, report, metadata)"""
        name = self.register(**options)
        records = {record["image_id"]: record for record in DatasetCatalog.get(name)}
        return records, dataset_report(name), MetadataCatalog.get(name)


@pytest.fixture
def file(tmp_path):
    return File(tmp_path)


def kinds(report):
    return {(kind, action): len(found) for (kind, action), found in report.groups().items()}


def pixels_of(item, height=HEIGHT, width=WIDTH):
    """An object's mask as Detectron2 makes it for training."""
    instances = annotations_to_instances([item], (height, width), mask_format="bitmask")
    return instances.gt_masks.tensor[0].numpy()


@pytest.mark.parametrize("masks", ["none", "polygon", "compressed", "uncompressed"])
def test_clean_data_are_read_as_detectron2_reads_them(file, masks):
    rng = np.random.default_rng(0)
    for image_id in (70, 4, 900):
        objects = []
        for _ in range(3):
            x, y, w, h = (int(v) for v in [*rng.integers(0, 20, 2), *rng.integers(2, 25, 2)])
            item = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            item["category_id"] = int(rng.choice([3, 12]))
            if masks == "polygon":
                item["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
            elif masks != "none":
                item["segmentation"] = rle((x, y, x + w, y + h), masks == "compressed")
            objects.append(item)
        file.add(image_id, *objects)
    file.add(5)
    records, report, metadata = file.read()
    json_file, images = str(file.root / "own.json"), str(file.root / "images")
    expected = load_coco_json(json_file, images, "reference_" + masks)
    assert list(records) == [record["image_id"] for record in expected] == [4, 5, 70, 900]
    for record, reference in zip(records.values(), expected, strict=True):
        for item, other in zip(
            record.pop("annotations"), reference.pop("annotations"), strict=True
        ):
            box = BoxMode.convert(other["bbox"], other["bbox_mode"], BoxMode.XYXY_ABS)
            assert item["bbox"] == list(box)
            assert item["category_id"] == other["category_id"]
            if masks != "none":
                np.testing.assert_array_equal(pixels_of(item), pixels_of(other))
        assert record == reference
    assert report.findings == []
    reference = MetadataCatalog.get("reference_" + masks)
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert getattr(metadata, key) == getattr(reference, key)
    assert metadata.has_masks == (masks != "none")
    assert metadata.mask_format == ("bitmask" if "compressed" in masks else "polygon")


def test_mixed_masks_become_rle_of_the_same_pixels(file):
    box = [10, 20, 20, 20]
    file.add(1, {"bbox": box, "segmentation": [SQUARE]})
    file.add(2, {"bbox": box, "segmentation": rle((10, 20, 30, 40))})
    records, _, metadata = file.read()
    assert metadata.mask_format == "bitmask"
    (first,), (second,) = (record["annotations"] for record in records.values())
    assert first["segmentation"] == second["segmentation"]


def test_crowds_of_rle_do_not_turn_polygons_into_bitmasks(file):
    file.add(
        1,
        {"bbox": [10, 20, 20, 20], "segmentation": [SQUARE]},
        {"bbox": [0, 0, 5, 5], "segmentation": rle((0, 0, 5, 5)), "iscrowd": 1},
    )
    records, _, metadata = file.read()
    assert metadata.mask_format == "polygon"
    assert [item["iscrowd"] for item in records[1]["annotations"]] == [0, 1]


@pytest.mark.parametrize("orientation", range(5, 9))
@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_masks_follow_the_pixels_that_detectron2_shows(file, orientation, kind):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[20:40, 10:30] = 255
    pixels[20:25, 10:15] = 0
    exif = Image.Exif()
    exif[274] = orientation
    segmentation = [[10, 25, 15, 25, 15, 20, 30, 20, 30, 40, 10, 40]]
    if kind == "rle":
        encoded = coco_mask.encode(np.asfortranarray(pixels // 255))
        segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    item = {"bbox": [10, 20, 20, 20], "segmentation": segmentation}
    file.add(1, item, image=Image.fromarray(pixels), exif=exif)
    records, report, _ = file.read()
    seen = read_image(records[1]["file_name"], "L")[..., 0] > 0
    (item,) = records[1]["annotations"]
    np.testing.assert_array_equal(pixels_of(item, *seen.shape), seen)
    y, x = np.nonzero(seen)
    assert item["bbox"] == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert kinds(report) == {("EXIF rotation", "objects turned with the image"): 1}


def test_categories_of_one_name_become_one_class_unless_their_kinds_differ(file):
    file.content["categories"] = [
        {"id": 9, "name": "cat"},
        {"id": 2, "name": " cat "},
        {"id": 5, "name": "mouse", "supercategory": "animal"},
        {"id": 6, "name": "mouse", "supercategory": "device"},
    ]
    file.add(1, *({"bbox": [1, 1, 9, 9], "category_id": c} for c in (9, 2, 5, 6)))
    records, report, metadata = file.read()
    assert metadata.thing_classes == ["cat", "mouse (animal)", "mouse (device)"]
    assert [item["category_id"] for item in records[1]["annotations"]] == [0, 0, 1, 2]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 5: 1, 6: 2}
    assert kinds(report) == {
        ("category name twice", "made one class"): 1,
        ("category name twice", "told apart by kind"): 2,
    }


def test_a_test_set_takes_the_order_of_the_training_classes(file):
    file.add(1, {"bbox": [1, 1, 9, 9], "category_id": 12})
    records, _, metadata = file.read(classes=["dog", "bird", "cat"])
    assert records[1]["annotations"][0]["category_id"] == 0
    assert metadata.thing_dataset_id_to_contiguous_id == {12: 0, 13: 1, 3: 2}
    assert file.read(classes=["dog"])[2].thing_classes == ["dog"]  # 'cat' is not used
    with pytest.raises(UserError, match="class 'dog' .*lacks"):
        file.register(classes=["cat"])


def test_images_are_found_or_skipped_by_name(file):
    box = {"bbox": [1, 1, 9, 9]}
    file.add(1, box, path="sub/folder/1.png")
    file.add(2, box, file_name="sub/2.png", path="sub/2.png")
    file.add(3, box)
    (file.root / "images/3.png").unlink()
    file.add(4, box, file_name=None)
    file.add(1, box, path="again.png", file_name="again.png")
    file.content["images"].append("nothing")
    records, report, _ = file.read()
    assert list(records) == [1, 2]
    assert kinds(report) == {
        ("image in another folder", "found by its name"): 1,
        ("image missing", "image skipped"): 1,
        ("image entry unreadable", "image skipped"): 2,
        ("image id twice", "image skipped"): 1,
        ("annotation without a usable image", "object skipped"): 2,
    }


def test_objects_are_mended_or_skipped_by_name(file):
    box = [10, 20, 20, 20]
    outside = rle((1, 1, 3, 3))
    outside["counts"] += "55"
    good = {"bbox": box, "segmentation": [SQUARE]}
    file.add(
        1,
        good,
        {"segmentation": [SQUARE]},
        {**good, "bbox": [10, 20, 0, 20]},
        {**good, "bbox": [50, 20, 20, 20]},
        {**good, "bbox": ["10", 20, 20, 20]},
        {**good, "segmentation": [[1, 2, 3, 4], SQUARE]},
        {**good, "segmentation": [[1, 2, 3, 4]]},
        {**good, "segmentation": outside},
        {**good, "segmentation": {"size": [5, 5], "counts": "55"}},
        {**good, "segmentation": rle((0, 0, 0, 0))},
        {"bbox": box},
        {**good, "category_id": 77},
        {**good, "ignore": 1},
    )
    records, report, _ = file.read()
    kept = [item["bbox"] for item in records[1]["annotations"]]
    assert kept == [[10, 20, 30, 40]] * 2 + [[50, 20, 64, 40]] + [[10, 20, 30, 40]] * 2
    assert [item["iscrowd"] for item in records[1]["annotations"]] == [0, 0, 0, 0, 1]
    assert records[1]["annotations"][3]["segmentation"] == [SQUARE]
    assert kinds(report) == {
        ("box missing", "taken from its mask"): 1,
        ("box empty", "object skipped"): 1,
        ("box partly outside the image", "clipped to the image"): 1,
        ("box unreadable", "object skipped"): 1,
        ("polygon of fewer than three points", "left out of the object's mask"): 1,
        ("mask unreadable: no polygon of three points", "object skipped"): 1,
        ("mask unreadable: RLE that does not add up to the image", "object skipped"): 1,
        ("mask unreadable: RLE of another size than the image", "object skipped"): 1,
        ("mask unreadable: empty", "object skipped"): 1,
        ("object without a mask in a data set of masks", "object skipped"): 1,
        ("category id 77 not in the list of categories", "object skipped"): 1,
        ("object marked 'ignore'", "treated as a crowd: not counted"): 1,
    }


def test_mistakes_are_one_clear_sentence(file, tmp_path):
    file.add(1, {"bbox": [1, 1, 9, 9]})
    file.register()
    path = file.root / "own.json"
    for text, message in {
        '{"images": [,]}': "is not JSON: .* at line 1, column 13",
        "[]": "has no list 'images'",
        '{"images": [], "annotations": {}}': "has no list 'annotations'",
        '{"images": [], "annotations": [], "categories": []}': "no usable image.*is empty",
        json.dumps({**file.content, "categories": []}): "names no class",
        json.dumps(
            {**file.content, "categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}
        ): "category id 3 twice, to 'a' and to 'b'",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            register(file.spec)
    with pytest.raises(UserError, match="cannot read .*nothing.json: No such file"):
        register(f"coco:{tmp_path}/nothing.json:{tmp_path}")
    path.write_text(json.dumps(file.content))
    with pytest.raises(UserError, match="image folder .*nowhere.* does not exist"):
        register(f"coco:{path}:{tmp_path}/nowhere")
    with pytest.raises(UserError, match="write voc:DIR:SPLIT"):
        register(f"coco:{path}")


def person(file, names=("nose", "left_eye", "right_eye"), **more):
    file.content["categories"] = [{"id": 3, "name": "person", "keypoints": list(names), **more}]
    return file


def points_of(item):
    return np.reshape(item["keypoints"], (-1, 3)).tolist()


def test_clean_keypoints_are_read_as_detectron2_reads_them(file):
    person(file, skeleton=[[1, 2], [1, 3]])
    box = {"bbox": [5, 5, 30, 30]}
    file.add(
        1,
        {**box, "keypoints": [7, 8, 2, 20, 21, 1, 0, 0, 0], "num_keypoints": 2},
        {**box, "keypoints": [0] * 9, "num_keypoints": 0},
    )
    records, report, metadata = file.read()
    json_file, images = str(file.root / "own.json"), str(file.root / "images")
    (expected,) = load_coco_json(json_file, images)
    for item, other in zip(records[1]["annotations"], expected["annotations"], strict=True):
        assert item["keypoints"] == other["keypoints"]
    assert report.findings == []
    assert metadata.keypoint_names == ("nose", "left_eye", "right_eye")
    assert metadata.keypoint_flip_map == (("left_eye", "right_eye"),)
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [
        ("nose", "left_eye"), ("nose", "right_eye"),
    ]  # fmt: skip
    # What Detectron2 makes of it when it flips an image.
    metadata = MetadataCatalog.get(file.register())
    assert create_keypoint_hflip_indices([metadata.name]) == [0, 2, 1]


def test_keypoints_follow_the_pixels_that_detectron2_shows(file):
    """One white pixel in an image with an EXIF rotation: its keypoint is the pixel's centre."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[25, 13] = 255
    exif = Image.Exif()
    exif[274] = 6
    item = {"bbox": [10, 20, 20, 20], "keypoints": [13, 25, 2, 0, 0, 0, 0, 0, 0]}
    person(file).add(1, item, image=Image.fromarray(pixels), exif=exif)
    records, _, _ = file.read()
    seen = read_image(records[1]["file_name"], "L")[..., 0]
    ((y, x),) = np.argwhere(seen > 0).tolist()
    assert points_of(records[1]["annotations"][0])[0] == [x + 0.5, y + 0.5, 2]


def test_keypoints_are_mended_by_name_and_their_objects_kept(file):
    good = {"bbox": [5, 5, 30, 30], "keypoints": [7, 8, 2, 20, 21, 1, 0, 0, 0]}
    person(file).add(
        1,
        good,
        {**good, "keypoints": [7, 8, 2, 20, 210, 1, 0, 0, 0]},
        {**good, "keypoints": [7, 8, 2]},
        {**good, "keypoints": [7, 8, 5, 20, 21, 1, 0, 0, 0]},
        {**good, "num_keypoints": 3},
        {**good, "num_keypoints": []},
        {"bbox": [5, 5, 30, 30]},
    )
    records, report, _ = file.read()
    labelled = [[v for _, _, v in points_of(a)] for a in records[1]["annotations"]]
    assert labelled == [[2, 1, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0], [2, 1, 0], [2, 1, 0], [0, 0, 0]]
    assert kinds(report) == {
        ("keypoint outside the image", "taken as not labelled"): 1,
        ("keypoints unreadable", "taken as not labelled"): 2,
        ("num_keypoints differs from the keypoints", "counted anew"): 2,
    }
    assert report.findings[0].object == "annotation 2 (person), keypoint 2"


@pytest.mark.parametrize(
    ("categories", "kind"),
    [
        ([{"id": 3, "name": "person"}], "keypoint names missing"),
        ([{"id": 3, "name": "person", "keypoints": ["a", "b"]},
          {"id": 4, "name": "cat", "keypoints": ["b", "a"]}], "several kinds of keypoints"),
        ([{"id": 3, "name": "person", "keypoints": ["a", "a"]}], "keypoint names unreadable"),
    ],
)  # fmt: skip
def test_unusable_names_of_keypoints_are_named(file, categories, kind):
    file.content["categories"] = categories
    file.add(1, {"bbox": [5, 5, 30, 30], "keypoints": [7, 8, 2, 9, 9, 2]})
    records, report, metadata = file.read()
    assert [finding.kind for finding in report.findings] == [kind]
    if kind == "keypoint names missing":
        assert metadata.keypoint_names == ("keypoint 1", "keypoint 2")
        assert points_of(records[1]["annotations"][0]) == [[7.5, 8.5, 2], [9.5, 9.5, 2]]
    else:
        assert metadata.get("keypoint_names") is None
        assert "keypoints" not in records[1]["annotations"][0]


def test_findings_of_several_data_sets_go_into_one_file(file, tmp_path):
    file.add(1, {"bbox": [1, 1, 90, 9]}, {"bbox": [1, 1, 0, 9]})
    name = file.register()
    other = File(tmp_path / "other")
    other.add(2, {"bbox": [1, 1, 9, 9]})
    count = write_findings([name, other.register()], tmp_path / "run" / "findings.json")
    content = json.loads((tmp_path / "run" / "findings.json").read_text())
    assert count == 2
    assert [d["spec"] for d in content["datasets"]] == [file.spec, other.spec]
    assert content["datasets"][0]["findings"][1] == {
        "kind": "box empty", "file": "1.png", "object": "annotation 2 (cat)",
        "action": "object skipped",
    }  # fmt: skip
    assert content["datasets"][1]["findings"] == []
    with pytest.raises(UserError, match="2 faults in"):
        file.register(strict=True)

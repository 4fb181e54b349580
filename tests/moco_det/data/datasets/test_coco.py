"""The COCO reader: against Detectron2's on clean data, and by name on what is wrong."""

import json
import os

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
    assert list(records) == [2]  # objects of the id 1 may be of either file
    assert kinds(report) == {
        ("image missing", "image skipped"): 1,
        ("image entry unreadable", "image skipped"): 2,
        ("image id twice", "image skipped"): 2,
        ("annotation without a usable image", "object skipped"): 4,
    }
    assert list(kinds(report))[-1][0] == "annotation without a usable image"


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
    with pytest.raises(UserError, match="there is no file or folder absent.json: write voc:DIR:"):
        register("coco:absent.json")


@pytest.mark.parametrize(
    "place", [".", "images", "../images", "train", "images/train", "instances_train", "../train"]
)
def test_a_file_alone_finds_the_images_beside_it(file, place):
    file.add(1, {"bbox": [10, 20, 20, 20]})
    content, path = file.content, file.root / "annotations" / "instances_train.json"
    for folder in ("annotations", "other"):
        (file.root / folder).mkdir()
    path.write_text(json.dumps(content))
    images = path.parent / place
    images.mkdir(parents=True, exist_ok=True)
    os.replace(file.root / "images" / "1.png", images / "1.png")
    (record,) = DatasetCatalog.get(register(f"coco:{path}"))
    assert os.path.samefile(record["file_name"], images / "1.png")
    assert dataset_report(f"coco:{path}").findings == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"data_row": {"id": "x"}, "projects": {}}], "in Labelbox's own format"),
        ([{"ID": "x", "Labeled Data": "a.jpg", "Label": {}}], "in Labelbox's own format"),
        ({"version": "5", "shapes": [], "imagePath": "a.jpg"}, "in LabelMe's own format"),
        ({"_via_settings": {}, "_via_img_metadata": {}}, "in VIA's own format"),
        ({"a.jpg123": {"filename": "a.jpg", "size": 1, "regions": []}}, "in VIA's own format"),
        ([{"id": 1, "data": {}, "annotations": []}], "in Label Studio's own format"),
        ([{"image": "a.jpg", "annotations": []}], "in Create ML's own format"),
    ],
)
def test_the_own_format_of_a_tool_is_named(tmp_path, content, message):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        register(f"coco:{path}:{tmp_path}")


def test_a_class_may_be_named_by_a_number(file):
    file.content["categories"] = [{"id": 3, "name": 7}, {"id": 12, "name": "8"}]
    file.add(1, {"bbox": [10, 20, 20, 20]})
    _, report, metadata = file.read()
    assert (metadata.thing_classes, report.findings) == (["7", "8"], [])


def test_one_json_object_a_line_is_named(tmp_path):
    path = tmp_path / "export.json"
    path.write_text('{"data_row": {}}\n{"data_row": {}}\n')
    with pytest.raises(UserError, match="several JSON values, one a line"):
        register(f"coco:{path}:{tmp_path}")


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


BOX = {"bbox": [1, 1, 9, 9]}


def test_boxes_written_as_strings_and_file_names_as_image_ids_are_read_and_noted(file):
    box = {"bbox": ["1", "1.0", "9", "9e0"]}
    file.add(1, box, {"bbox": ["1", "x", "9", "9"]}, {"bbox": []})
    file.add(2, {**BOX, "image_id": "2.png"}, {**BOX, "image_id": "3.png"})
    file.add(3, file_name="1.png", path="1.png")
    records, report, _ = file.read()
    found = {key: [item["bbox"] for item in r["annotations"]] for key, r in records.items()}
    assert found == {1: [[1, 1, 10, 10]], 2: [[1, 1, 10, 10]]}
    assert kinds(report) == {
        ("box unreadable", "object skipped"): 2,
        ("annotation of an image that is not listed", "object skipped"): 1,
        ("image listed twice", "made one image"): 1,
    }
    assert report.notes == [
        "1 box written as strings: read as numbers",
        "image_id holds a file name in 1 annotation: taken as that image's id",
    ]


def test_a_file_name_of_two_images_is_no_image_id(file):
    file.add(1, {**BOX, "image_id": "1.png"})
    file.add(2, file_name="1.png")
    records, report, _ = file.read()
    assert records[1]["annotations"] == []
    assert ("annotation of an image that is not listed", "object skipped") in kinds(report)


def test_images_and_objects_that_are_listed_twice_are_taken_once(file):
    file.add(1, BOX, {"bbox": [5, 5, 20, 20]})
    file.add(11, BOX, {"bbox": [7, 7, 20, 20]}, file_name="./1.png", path="1.png")
    file.add(2, BOX, {**BOX, "category_id": 12}, {**BOX, "iscrowd": 1}, {**BOX, "area": 5})
    file.add(3, file_name="2.png", width=640, height=480)
    records, report, _ = file.read()
    found = {key: [item["bbox"] for item in r["annotations"]] for key, r in records.items()}
    one = [1, 1, 10, 10]
    assert found == {1: [one, [5, 5, 25, 25], [7, 7, 27, 27]], 2: [one, one, one]}
    assert kinds(report) == {
        ("image listed twice", "made one image"): 1,
        ("image listed twice", "image skipped"): 1,
        ("object listed twice", "taken once"): 2,
    }
    with pytest.raises(UserError, match="image listed twice"):
        file.register(strict=True)


def test_an_image_is_never_taken_for_another(file):
    """Oracle: the colour of the picture that an entry is about."""
    for number, path in enumerate(["x/1.png", "x/2.png", "y/2.png", "deep/z/4.png", "x/6.png"], 1):
        file.add(
            number, BOX, path=path, file_name=path, image=Image.new("L", (WIDTH, HEIGHT), number)
        )
    entries = file.content["images"]
    entries[2]["file_name"] = "y\\2.png"
    entries[3]["file_name"] = "data/deep/z/4.png"
    for number, name in {
        11: "y/1.png",
        12: "1.png",
        13: "2.png",
        14: "X/6.PNG",
        15: "w/6.png",
    }.items():
        entries.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
    del entries[4]
    records, report, _ = file.read()
    seen = {key: int(read_image(r["file_name"], "L")[0, 0, 0]) for key, r in records.items()}
    assert seen == {1: 1, 2: 2, 3: 3, 4: 4, 14: 5}
    missing = [finding for finding in report.findings if finding.kind == "image missing"]
    assert [finding.file for finding in missing] == ["y/1.png", "1.png", "2.png", "w/6.png"]
    assert f"looked for {file.root}/images/y/1.png; the nearest file is" in missing[0].object
    assert missing[0].object.endswith("images/x/1.png")


def test_two_entries_that_could_be_one_file_are_both_missing(file):
    for key, name in ((1, "x/1.png"), (2, "y/1.png")):
        file.add(key, BOX, path="1.png", file_name=name)
    with pytest.raises(
        UserError, match="no usable image: 2 x image missing .*nearest file is .*1.png"
    ):
        file.register()


@pytest.mark.parametrize(
    ("name", "on_disk"),
    [
        ("1.JPG", "1.jpg"),
        ("a%20b.png", "a b.png"),
        ("u\u0308.png", "\xfc.png"),
        ("\xfc.png", "u\u0308.png"),
        ("Images/1.png", "images/1.png"),
    ],
)
def test_other_spellings_of_a_name_are_found_and_named(file, name, on_disk):
    file.add(1, BOX, file_name=name, path=on_disk)
    records, report, _ = file.read()
    assert records[1]["file_name"] == str(file.root / "images" / on_disk)
    (finding,) = report.findings
    assert finding.kind in ("image name in another spelling", "image in another folder")


def test_the_cause_comes_before_its_consequences(file, tmp_path):
    file.add(1, *[BOX] * 1, *({"bbox": [1, 1, 9, 9 + n]} for n in range(1, 30)))
    file.register()
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    with pytest.raises(
        UserError, match=f"1 x image missing .*nearest file is {tmp_path}/images/1.png"
    ):
        register(f"coco:{tmp_path}/own.json:{wrong}")
    with pytest.raises(
        UserError, match=f"absent .*does not exist: the nearest image is {tmp_path}"
    ):
        register(f"coco:{tmp_path}/own.json:{tmp_path}/absent")
    file.content["images"][0]["file_name"] = "2" * 300 + ".png"
    with pytest.raises(UserError, match="1 x image missing .*no file has such a name"):
        file.register()
    del file.content["images"][0]["file_name"]
    with pytest.raises(
        UserError, match="1 x image entry unreadable .*lacks a name under 'file_name'"
    ):
        file.register()
    file.content["images"][0]["filename"] = "1.png"
    records, report, _ = file.read()
    assert kinds(report) == {("images named under 'filename'", "read as 'file_name'"): 1}
    assert len(records[1]["annotations"]) == 30


@pytest.mark.parametrize("write", [float, str, int])
def test_ids_match_whatever_their_type(file, write):
    file.add(7, BOX, {**BOX, "category_id": 12})
    for entry in file.content["annotations"]:
        entry["category_id"] = write(entry["category_id"])
        entry["image_id"] = write(entry["image_id"])
    records, report, metadata = file.read()
    assert [item["category_id"] for item in records[7]["annotations"]] == [0, 1]
    assert report.findings == []
    for entry in file.content["categories"]:
        entry["id"] = write(entry["id"])
    assert file.read()[2].thing_dataset_id_to_contiguous_id == {3: 0, 12: 1}
    for entry in [*file.content["categories"], *file.content["annotations"]]:
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = {"3": "c", "12": "b"}[str(int(float(entry[key])))]
    records, report, metadata = file.read()
    assert metadata.thing_classes == ["dog", "cat"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1}
    assert [item["category_id"] for item in records[7]["annotations"]] == [1, 0]


def test_flags_and_negative_sizes_are_read(file):
    flags = ["1", 1.0, True, "true", 0, "0", None, "false", "perhaps"]
    file.add(1, *({"bbox": [1, 1, 9, 9 + n], "iscrowd": flag} for n, flag in enumerate(flags)))
    file.add(2, {"bbox": [30, 40, -20, 5]}, {"bbox": [10, 40, 20, -20]})
    records, report, _ = file.read()
    assert [a["iscrowd"] for a in records[1]["annotations"]] == [1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert [a["bbox"] for a in records[2]["annotations"]] == [[10, 40, 30, 45], [10, 20, 30, 40]]
    assert kinds(report) == {
        ("iscrowd unreadable", "taken as 0"): 1,
        ("box corners swapped", "put in order"): 2,
    }


def test_boxes_in_other_units_are_recognised_over_the_data_set(file):
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(20):
        x, y, w, h = *rng.integers(0, 40, 2), *rng.integers(2, 9, 2)
        boxes.append([int(v) for v in (x, y, x + w, y + h - 1 if y < 40 else 48)])
    file.add(1, *({"bbox": box} for box in boxes))
    with pytest.raises(UserError, match="of 20 boxes reach beyond .* the file holds corners"):
        file.register()
    file.content["annotations"][3:] = []
    assert "boxes that seem to be corners" in file.read()[1].summary()
    file.add(2, *({"bbox": [n / 9, 0.5, 0.1, 0.25]} for n in range(9)))
    with pytest.raises(
        UserError, match="9 of 12 boxes lie between 0 and 1, so they are normalised"
    ):
        file.register()


def test_boxes_that_reach_beyond_the_image_are_no_corners_where_one_says_otherwise(file):
    boxes = [[n, n, 60, 44] for n in range(5, 15)]
    file.add(1, *({"bbox": box} for box in boxes), {"bbox": [40, 30, 10, 10]})
    _, report, _ = file.read()
    assert kinds(report) == {("box partly outside the image", "clipped to the image"): 10}


MASKS = {
    "rectangle": ([10, 20, 30, 40], True),
    "rectangle in a list": ([[10, 20, 30, 40]], True),
    "x, y, w, h": ([[10, 20, 20, 20]], True),
    "another rectangle": ([[1, 2, 3, 4]], False),
    "points": ([[10, 20], [30, 20], [30, 40], [10, 40]], True),
    "points in a list": ([[[10, 20], [30, 20], [30, 40], [10, 40]]], True),
    "RLE in a list": ([rle((10, 20, 30, 40))], True),
    "RLE of two parts": ([rle((10, 20, 30, 30)), rle((10, 30, 30, 40))], True),
    "size as text": ({**rle((10, 20, 30, 40)), "size": ["48", "64"]}, True),
    "no polygon": ([], False),
    "an empty polygon": ([[]], False),
    "text": ("mask", False),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_judged_only_where_they_are_wanted(file, name):
    odd, certain = MASKS[name]
    box = [10, 20, 20, 20]
    file.add(1, {"bbox": box, "segmentation": odd}, {"bbox": [0, 0, 9, 9]})
    file.add(
        2, {"bbox": box, "segmentation": [SQUARE]}, {"bbox": [1, 1, 5, 5], "segmentation": [SQUARE]}
    )
    file.content["annotations"][1]["segmentation"] = [SQUARE]
    records, report, metadata = file.read(masks=False)
    assert [len(record["annotations"]) for record in records.values()] == [2, 2]
    assert records[1]["annotations"][0]["bbox"] == [10, 20, 30, 40]
    assert not any("segmentation" in a or "mask_finding" in a for a in records[1]["annotations"])
    assert (report.findings, metadata.has_masks) == ([], False)
    records, report, metadata = file.read()
    assert metadata.has_masks
    assert len(records[1]["annotations"]) == 1 + certain
    assert len(report.findings) == (not certain)
    if certain:
        expected = np.zeros((HEIGHT, WIDTH), bool)
        expected[20:40, 10:30] = True
        np.testing.assert_array_equal(pixels_of(records[1]["annotations"][0]), expected)


def test_roboflows_empty_category_is_left_out_and_said(file):
    file.content["categories"] = [
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 3, "name": "cat", "supercategory": "cells"},
        {"id": 12, "name": "dog", "supercategory": "cells"},
    ]
    file.add(1, BOX)
    _, report, metadata = file.read(strict=True)
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 12: 1}
    assert "note: the category 'cells' (id 0) has no object" in report.summary()
    file.add(2, {**BOX, "category_id": 0})
    assert file.read(strict=True)[2].thing_classes == ["cells", "cat", "dog"]


@pytest.mark.parametrize(
    ("json_file", "images"),
    [
        ("train/_annotations.coco.json", "train"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train.json", "images/train"),
        ("train.json", "images"),
        ("labels/train.json", "images"),
    ],
)
def test_a_layout_is_found_by_itself(file, json_file, images):
    file.add(1, BOX)
    file.register()
    root = file.root / "set"
    for split, colour in (("train", 1), ("valid", 2)):
        path, folder = (root / p.replace("train", split) for p in (json_file, images))
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        name = "1.png" if split in images or "train" in images else f"{split}.png"
        Image.new("L", (WIDTH, HEIGHT), colour).save(folder / name)
        file.content["images"][0]["file_name"] = name
        path.write_text(json.dumps(file.content))
    for split, colour in (("train", 1), ("valid", 2)):
        (record,) = DatasetCatalog.get(register(f"coco:{root}:{split}", strict=True))
        assert read_image(record["file_name"], "L")[0, 0, 0] == colour
    with pytest.raises(UserError, match="no annotation file of the split 'test' .*train"):
        register(f"coco:{root}:test")
    with pytest.raises(UserError, match="2 annotation files"):
        register(f"coco:{root}:all")
    with pytest.raises(UserError, match="2 annotation files"):
        register(f"coco:{root}:90%")


def test_a_share_and_its_rest_make_up_the_whole(file):
    for number in range(1, 21):
        file.add(number, BOX)
    file.register()
    parts = [DatasetCatalog.get(register(f"{file.spec}:{part}")) for part in ("80%", "80%-rest")]
    assert [len(part) for part in parts] == [16, 4]
    ids = sorted(record["image_id"] for part in parts for record in part)
    assert ids == list(range(1, 21))


def test_masks_none_of_which_is_readable_are_named_and_the_boxes_kept(file):
    file.add(1, {**BOX, "segmentation": [[]]}, {"bbox": [2, 2, 9, 9], "segmentation": "mask"})
    records, report, metadata = file.read()
    assert (len(records[1]["annotations"]), metadata.has_masks) == (2, False)
    assert set(kinds(report).values()) == {1}
    assert {action for _, action in kinds(report)} == {"mask ignored"}
    assert file.read(masks=False)[1].findings == []

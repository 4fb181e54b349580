"""moco-data on annotated images: counts, copies, the sheet, and the way to COCO and back."""

import json
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import moco_det  # noqa: F401
from moco_common.errors import UserError
from moco_common.files import same_content
from moco_det.data.register import register
from moco_det.survey.contact_sheet import choose_images
from moco_det.survey.survey import Options, survey
from tests.moco_det.data.datasets.test_coco import File
from tests.moco_det.data.datasets.test_voc import Folder, box_xml
from tools import data as tool


def run(capsys, *words):
    """Exit status of the command line, and what it printed."""
    status = tool.main(list(map(str, words)))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def voc(tmp_path):
    folder = Folder(tmp_path / "VOC")
    rng = np.random.default_rng(0)
    for number, objects in enumerate(
        (
            [box_xml("cat", (2, 3, 20, 30)), box_xml("dog", (1, 1, 64, 48))],
            [box_xml("cat", (5, 5, 9, 9), "<difficult>1</difficult>")],
            [],
            [box_xml("cat", (10, 10, 40, 40))],
        )
    ):
        image = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        folder.add(f"2007_{number}", *objects, image=image, suffix=".png")
    return folder


def test_images_and_objects_are_counted_by_class_and_size(voc, capsys):
    status, out, _ = run(capsys, f"voc:{voc.root}", "--json")
    (found,) = json.loads(out)["datasets"]
    assert status == 0
    assert found["images"] == 4
    assert found["objects"] == 4
    assert found["objects_per_image"] == {"least": 0, "median": 1.0, "mean": 1.0, "most": 2}
    # From the corners above, which VOC counts from 1 and both inside: 19 x 28, 5 x 5, 31 x 31.
    cat = {"objects": 3, "images": 3, "small": 3, "medium": 0, "large": 0, "ignored": 1, "masks": 0}
    dog = {"objects": 1, "images": 1, "small": 0, "medium": 1, "large": 0, "ignored": 0, "masks": 0}
    assert found["classes"] == {"cat": cat, "dog": dog}
    sides = [np.sqrt(area) for area in (19 * 28, 64 * 48, 5 * 5, 31 * 31)]
    assert found["box_sides"]["50"] == pytest.approx(np.percentile(sides, 50))
    assert found["image_sizes"] == {
        "different": 1,
        **dict.fromkeys(("smallest", "median", "largest"), [64, 48]),
    }


def test_a_finding_is_printed_and_counts_under_strict_alone(voc, capsys):
    voc.add("empty", box_xml("dog", (7, 7, 7, 9)))
    spec = f"voc:{voc.root}:all"
    status, out, err = run(capsys, spec)
    assert (status, err) == (0, "")
    assert "1 x box empty: object skipped (Annotations/empty.xml, object 1 (dog))" in out
    status, _, err = run(capsys, spec, "--strict")
    assert (status, err) == (1, "error: 1 fault in the data\n")


def test_every_image_is_decoded_on_request(voc, capsys):
    path = voc.root / "JPEGImages" / "2007_1.png"
    path.write_bytes(path.read_bytes()[:-2000])
    assert run(capsys, f"voc:{voc.root}")[0] == 0
    status, out, _ = run(capsys, f"voc:{voc.root}", "--check-images")
    assert status == 1
    assert f"cannot be decoded: {path}" in out
    assert "dog" in out


def test_an_image_in_two_data_sets_is_named(voc, capsys):
    (voc.root / "ImageSets/Main/train.txt").write_text("2007_0\n2007_1\n")
    (voc.root / "ImageSets/Main/test.txt").write_text("2007_1\n2007_3\n")
    _, out, _ = run(capsys, f"voc:{voc.root}:train", f"voc:{voc.root}:test")
    assert "warning: 1 image in several of these data sets" in out
    assert "2007_1.png" in out.splitlines()[-1]


def test_copies_under_another_name_are_found_by_content(tmp_path):
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one"), ("d", b"longer")):
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in "abcd"]
    assert same_content([*paths, str(tmp_path / "missing")]) == [[paths[0], paths[2]]]


def test_the_way_to_coco_keeps_every_box_and_class(voc, tmp_path, capsys):
    spec, file = f"voc:{voc.root}:all", tmp_path / "out" / "boxes.json"
    assert run(capsys, spec, "--to-coco", file)[0] == 0
    before, after = register(spec), register(f"coco:{file}")
    old = {r["file_name"]: r for r in DatasetCatalog.get(before)}
    new = {r["file_name"]: r for r in DatasetCatalog.get(after)}
    new = {os.path.normpath(path): record for path, record in new.items()}
    assert new.keys() == old.keys()
    assert MetadataCatalog.get(after).thing_classes == MetadataCatalog.get(before).thing_classes
    for path, record in new.items():
        items = [(i["category_id"], i["bbox"]) for i in record["annotations"]]
        assert items == [(i["category_id"], i["bbox"]) for i in old[path]["annotations"]]
        crowds = [i["iscrowd"] for i in record["annotations"]]
        assert crowds == [i["difficult"] for i in old[path]["annotations"]]
    content = json.loads(file.read_text())
    assert [image["id"] for image in content["images"]] == [1, 2, 3, 4]
    assert [c["id"] for c in content["categories"]] == [1, 2]
    assert all(not image["file_name"].startswith("/") for image in content["images"])


def test_ids_masks_and_keypoints_of_a_coco_file_survive_the_conversion(tmp_path, capsys):
    file = File(tmp_path / "data")
    points = {"keypoints": [20, 30, 2, 25, 35, 1], "num_keypoints": 2}
    square = [[10, 20, 30, 20, 30, 40, 10, 40]]
    file.add(7, {"bbox": [10, 20, 20, 20], "segmentation": square, "area": 400.0, **points})
    for category in file.content["categories"]:
        category |= {"keypoints": ["head", "tail"], "skeleton": [[1, 2]]}
    file.register()
    out = tmp_path / "data" / "again.json"
    assert run(capsys, file.spec, "--to-coco", out)[0] == 0
    content = json.loads(out.read_text())
    (annotation,) = content["annotations"]
    (given,) = file.content["annotations"]
    for key in ("image_id", "category_id", "bbox", "segmentation", "area", "keypoints"):
        assert annotation[key] == given[key]
    assert content["categories"] == file.content["categories"]


def test_a_split_by_share_makes_two_files_without_a_common_image(voc, tmp_path, capsys):
    out = tmp_path / "boxes.json"
    assert run(capsys, f"voc:{voc.root}", "--to-coco", out, "--split", "50%")[0] == 0
    parts = [
        {image["file_name"] for image in json.loads(path.read_text())["images"]}
        for path in (tmp_path / "boxes-train.json", tmp_path / "boxes-val.json")
    ]
    assert [len(part) for part in parts] == [2, 2]
    assert not parts[0] & parts[1]
    assert not out.exists()


def test_no_output_takes_the_place_of_a_file_of_the_user(voc, tmp_path, capsys):
    spec = f"voc:{voc.root}"
    own = tmp_path / "mine.json"
    own.write_text('{"info": {"contributor": "somebody"}}')
    status, _, err = run(capsys, spec, "--to-coco", own)
    assert (status, own.read_text()) == (1, '{"info": {"contributor": "somebody"}}')
    assert "is not replaced" in err
    picture = tmp_path / "photo.jpg"
    Image.new("RGB", (9, 9)).save(picture)
    before = picture.read_bytes()
    assert run(capsys, spec, "--sheet", picture)[0] == 1
    assert picture.read_bytes() == before
    for place in (voc.root / "sheet.png", voc.root / "JPEGImages" / "2007_0.png"):
        status, _, err = run(capsys, spec, "--sheet", place)
        assert status == 1
        assert "would lie among the images" in err
    # What the tool itself wrote is replaced, unless it is what is read.
    out = tmp_path / "boxes.json"
    for _ in range(2):
        assert run(capsys, spec, "--to-coco", out)[0] == 0
    status, _, err = run(capsys, f"coco:{out}", "--to-coco", out)
    assert status == 1
    assert "is an input" in err


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_sheet_shows_boxes_in_the_colour_of_their_class(voc, tmp_path, capsys, suffix):
    path = tmp_path / f"sheet{suffix}"
    for _ in range(2):  # its own file is replaced
        status, _, err = run(capsys, f"voc:{voc.root}", "--sheet", path, "--images", 3)
        assert status == 0
        assert "3 images" in err
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    orange = np.abs(pixels - (0xE6, 0x9F, 0x00)).sum(axis=2) < 30
    assert orange.sum() > 100


def test_a_sheet_of_label_maps_is_drawn(tmp_path, capsys):
    for name, content in (("images", 90), ("labels", 1)):
        (tmp_path / name).mkdir()
        Image.new("L", (64, 48), content).save(tmp_path / name / "1.png")
    spec = f"semseg:{tmp_path / 'images'}:{tmp_path / 'labels'}"
    status, out, _ = run(capsys, spec, "--sheet", tmp_path / "sheet.png")
    assert status == 0
    assert ["class", "1", "1", "100.00", "%"] in [line.split() for line in out.splitlines()]


def test_a_sheet_shows_each_class_and_then_even_spacing():
    records = [{"file_name": str(n), "annotations": [{"category_id": 0}]} for n in range(20)]
    records[13]["annotations"].append({"category_id": 1})
    records[4]["annotations"] = []
    chosen = [record["file_name"] for record in choose_images(records, 4)]
    assert len(chosen) == 4
    assert "13" in chosen
    assert "4" not in chosen
    assert chosen == sorted(chosen, key=int)
    assert [r["file_name"] for r in choose_images(records[:1], 4)] == ["0"]


@pytest.mark.parametrize("share", ["0", "100%", "x", "-5%"])
def test_a_share_that_is_none_is_refused(voc, tmp_path, share):
    options = Options([f"voc:{voc.root}"], to_coco=tmp_path / "a.json", split=share)
    with pytest.raises(UserError, match="a share is above 0 % and below 100 %"):
        survey(options)
    with pytest.raises(UserError):
        survey(Options([f"voc:{voc.root}"], to_coco=tmp_path / "a.json", split="99.9%"))

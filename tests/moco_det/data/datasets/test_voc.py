"""The VOC reader: against Detectron2's on clean data, and by name on what is wrong."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.data.detection_utils import read_image
from PIL import Image

import moco_det  # noqa: F401
from moco_common.errors import UserError
from moco_det.data.register import dataset_report, register


def box_xml(name="cat", box=(2, 3, 20, 30), difficult="<difficult>0</difficult>"):
    x0, y0, x1, y1 = box
    return (
        f"<object><name>{name}</name>{difficult}<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
    )


def size_xml(width, height):
    return f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"


class Folder:
    """A VOC folder that a test fills image by image."""

    def __init__(self, root):
        self.root, self.ids = root, []
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / name).mkdir(parents=True)

    def add(self, image_id, *objects, size=(64, 48), image=None, suffix=".jpg", **save):
        self.ids.append(image_id)
        for folder, ending in (("Annotations", ".xml"), ("JPEGImages", suffix)):
            (self.root / folder / f"{image_id}{ending}").parent.mkdir(parents=True, exist_ok=True)
        text = f"<annotation>{size_xml(*size) if size else ''}{''.join(objects)}</annotation>"
        (self.root / f"Annotations/{image_id}.xml").write_text(text)
        if image is None:
            image = Image.new("RGB", (64, 48))
        image.save(self.root / f"JPEGImages/{image_id}{suffix}", **save)

    def read(self, split="train", **options):
        """(records by image id, report)"""
        (self.root / f"ImageSets/Main/{split}.txt").write_text("\n".join(self.ids))
        name = register(f"voc:{self.root}:{split}", **options)
        return {r["image_id"]: r for r in DatasetCatalog.get(name)}, dataset_report(name)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "VOC")


def boxes(record):
    return [item["bbox"] for item in record["annotations"]]


def kinds(report):
    return {(kind, action): len(found) for (kind, action), found in report.groups().items()}


def test_clean_data_are_read_as_detectron2_reads_them(folder):
    rng = np.random.default_rng(0)
    for number in range(6):
        low = rng.integers(1, 30, (3, 2))
        corners = np.concatenate([low, low + rng.integers(1, 18, (3, 2))], axis=1)
        objects = [box_xml(rng.choice(["cat", "ant", "bee"]), box) for box in corners]
        folder.add(f"{number:06d}", *objects)
    records, report = folder.read()
    expected = load_voc_instances(str(folder.root), "train", ["ant", "bee", "cat"])
    for record in records.values():
        for item in record["annotations"]:
            assert (item.pop("difficult"), item.pop("iscrowd")) == (0, 0)
    assert list(records.values()) == expected
    assert report.findings == []
    assert (report.images, report.objects, report.classes) == (6, 18, ["ant", "bee", "cat"])


def test_all_splits_of_a_folder_agree_on_the_classes(folder):
    folder.add("1", box_xml("zebra"))
    folder.read("train")
    folder.ids = []
    folder.add("2", box_xml("ant"))
    records, report = folder.read("test")
    assert report.classes == ["ant", "zebra"]
    assert list(records) == ["2"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_follow_the_pixels_that_detectron2_shows(folder, orientation):
    """Oracle: where the bright rectangle lies in the image that Detectron2 reads."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[8:24, 16:24] = 255
    exif = Image.Exif()
    exif[274] = orientation
    xml = box_xml(box=(17, 9, 24, 24))
    options = {"suffix": ".png", "exif": exif}
    folder.add("stored", xml, image=Image.fromarray(pixels), **options)
    records, report = folder.read()
    record = records["stored"]
    seen = read_image(record["file_name"], "RGB")
    assert seen.shape[:2] == (record["height"], record["width"])
    if orientation in (2, 3, 4):  # the size cannot tell: kept as annotated, and said
        assert boxes(record) == [[16, 8, 24, 24]]
        assert "does not tell" in report.summary()
        return
    y, x = np.nonzero(seen[..., 0])
    assert boxes(record) == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
    turned = ("EXIF rotation", "objects turned with the image")
    assert kinds(report) == ({turned: 1} if orientation > 4 else {})


def test_boxes_annotated_in_the_shown_frame_are_kept(folder):
    exif = Image.Exif()
    exif[274] = 6
    folder.add("shown", box_xml(), size=(48, 64), exif=exif)
    records, report = folder.read()
    assert boxes(records["shown"]) == [[1, 2, 20, 30]]
    assert report.findings == []


def test_a_wrong_size_is_mended_where_the_frame_is_certain(folder):
    folder.add("typo", box_xml(), size=(100, 48))
    folder.add("halved", box_xml(box=(101, 1, 120, 60)), size=(128, 96))
    folder.add("unclear", box_xml(), size=(128, 96))
    folder.add("none", box_xml(), size=None)
    records, report = folder.read()
    assert boxes(records["typo"]) == boxes(records["none"]) == [[1, 2, 20, 30]]
    assert boxes(records["halved"]) == [[50, 0, 60, 30]]
    assert "unclear" not in records
    assert all((r["width"], r["height"]) == (64, 48) for r in records.values())
    assert kinds(report) == {
        ("size differs", "the file's size taken, boxes kept"): 1,
        ("size differs", "boxes scaled to the file's size"): 1,
        ("size differs", "image skipped, its frame cannot be told"): 1,
        ("size missing", "taken from the image file"): 1,
    }


def test_boxes_are_mended_or_skipped_by_name(folder):
    folder.add(
        "a",
        box_xml("cat", (60, 3, 90, 30)),
        box_xml("dog", (5, 5, 5, 5)),
        box_xml("cat", (70, 3, 90, 30)),
        box_xml("cat", (20, 30, 2, 3)),
        box_xml("cat", ("nan", 3, 20, 30)),
        box_xml("", (2, 3, 20, 30)),
        box_xml("cat", (2, 3, 20, 30), difficult=""),
        box_xml(" cat\n", (2.5, 3, 64, 48), difficult="<difficult>1</difficult>"),
    )
    records, report = folder.read()
    assert boxes(records["a"]) == [
        [59, 2, 64, 30],
        [1, 2, 20, 30],
        [1, 2, 20, 30],
        [1.5, 2, 64, 48],
    ]
    assert [item["difficult"] for item in records["a"]["annotations"]] == [0, 0, 0, 1]
    assert kinds(report) == {
        ("box partly outside the image", "clipped to the image"): 1,
        ("box empty", "object skipped"): 1,
        ("box outside the image", "object skipped"): 1,
        ("box corners swapped", "put in order"): 1,
        ("box unreadable", "object skipped"): 1,
        ("class name missing", "object skipped"): 1,
        ("difficult missing", "taken as 0"): 1,
    }
    assert "Annotations/a.xml, object 2 (dog)" in report.summary()
    assert report.classes == ["cat", "dog"]


def test_images_that_cannot_be_used_are_skipped_by_name(folder):
    folder.add("good", box_xml())
    folder.add("no_image", box_xml())
    (folder.root / "JPEGImages/no_image.jpg").unlink()
    folder.add("broken", box_xml())
    (folder.root / "JPEGImages/broken.jpg").write_bytes(b"GIF89a")
    folder.add("bad_xml", box_xml())
    (folder.root / "Annotations/bad_xml.xml").write_text("<annotation><object>")
    folder.add("deep", box_xml(), image=Image.new("I;16", (64, 48)), suffix=".png")
    folder.ids += ["no_xml", "good"]
    records, report = folder.read()
    assert list(records) == ["good"]
    assert {(f.kind, f.file) for f in report.findings} == {
        ("image missing", "JPEGImages/no_image"),
        ("image unreadable", "JPEGImages/broken.jpg"),
        ("annotation unreadable", "Annotations/bad_xml.xml"),
        (
            "image of mode I;16, more than 8 bits a channel: convert it to 8 bits",
            "JPEGImages/deep.png",
        ),
        ("annotation missing", "Annotations/no_xml.xml"),
        ("id twice in the split", "train.txt"),
    }


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_other_kinds_of_images_are_taken_and_readable(folder, mode):
    suffix = ".jpg" if mode == "CMYK" else ".png"
    folder.add("deep/er/a", box_xml(), image=Image.new(mode, (64, 48)), suffix=suffix)
    folder.add("b", size=(64, 48))
    records, report = folder.read()
    assert read_image(records["deep/er/a"]["file_name"], "RGB").shape == (48, 64, 3)
    assert boxes(records["b"]) == []
    assert (report.findings, report.images_without_objects) == ([], 1)


def test_the_split_all_needs_no_image_sets(folder):
    folder.add("2", box_xml())
    folder.add("1", box_xml())
    records = DatasetCatalog.get(register(f"voc:{folder.root}:all"))
    assert [record["image_id"] for record in records] == ["1", "2"]


def test_a_test_set_takes_the_order_of_the_training_classes(folder):
    folder.add("1", box_xml("cat"), box_xml("ant"))
    records, _ = folder.read(classes=["cat", "dog", "ant"])
    assert [item["category_id"] for item in records["1"]["annotations"]] == [0, 2]
    with pytest.raises(UserError, match="has the class 'ant' .*lacks"):
        folder.read(classes=["cat", "dog"])


def test_mistakes_are_one_clear_sentence(folder, tmp_path):
    folder.add("1", box_xml())
    folder.read("train")
    for spec, message in {
        f"voc:{tmp_path}:train": f"not a VOC folder.*did you mean {folder.root}",
        f"voc:{folder.root}:tset": "no split 'tset'.*: train, all",
        f"voc:{folder.root}": "is not a data set: write voc:DIR:SPLIT",
        "voc_2007_trainvla": "did you mean voc_2007_trainval",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            register(spec)
        assert "\n" not in str(caught.value)
    (folder.root / "JPEGImages/1.jpg").unlink()
    with pytest.raises(UserError, match="no usable image: 1 x image missing"):
        folder.read("train")


def test_strict_makes_a_finding_an_error(folder):
    folder.add("1", box_xml(), box_xml(box=(5, 5, 5, 5)))
    with pytest.raises(UserError, match="box empty"):
        folder.read(strict=True)


def test_detectron2s_own_names_pass_through():
    assert register("voc_2007_trainval") == "voc_2007_trainval"
    classes = MetadataCatalog.get("voc_2007_trainval").thing_classes
    assert register("voc_2007_test", classes=classes) == "voc_2007_test"
    with pytest.raises(UserError, match="classes of voc_2007_test"):
        register("voc_2007_test", classes=["cat"])


def test_what_is_registered_under_its_spec_is_fresh_at_each_call(folder):
    folder.add("1", box_xml())
    folder.read("train")
    name = register(f"voc:{folder.root}:train")
    DatasetCatalog.get(name)[0]["annotations"].clear()
    assert len(DatasetCatalog.get(name)[0]["annotations"]) == 1
    assert name == f"voc:{folder.root}:train"
    metadata = MetadataCatalog.get(name)
    assert (metadata.evaluator_type, metadata.has_masks) == ("voc", False)


def test_the_report_is_written_with_every_finding(folder, tmp_path):
    folder.add("1", box_xml(), box_xml(box=(5, 5, 5, 5)), box_xml(box=(6, 6, 6, 6)))
    _, report = folder.read()
    report.write_json(tmp_path / "out/report.json")
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert [finding["object"] for finding in written["findings"]] == [
        "object 2 (cat)",
        "object 3 (cat)",
    ]
    assert written["counts"][0]["count"] == 2
    assert len(report.summary().splitlines()) == 2

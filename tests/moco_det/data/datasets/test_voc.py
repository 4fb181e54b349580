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
        f"voc:{folder.root}:": "is not a data set: write voc:DIR:SPLIT",
        f"voc:{folder.root}/absent": "there is no file or folder .*absent: write voc:DIR:SPLIT",
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


def test_names_with_blanks_flags_and_suffixes_are_found(folder):
    for name in ("IMG 1", "IMG 2", "c", "d 1"):
        folder.add(name, box_xml())
    folder.ids = ["IMG 1.jpg", "IMG 2  1", "JPEGImages\\c.jpg", "d 1", "e f"]
    records, report = folder.read()
    assert list(records) == ["IMG 1", "IMG 2", "c", "d 1"]
    assert kinds(report) == {("annotation missing", "image skipped"): 1}


def test_flags_are_read_as_they_are_written(folder):
    texts = ["True", "false", "1", "0", "2", "maybe"]
    objects = [
        box_xml(box=(2 + number, 3, 20, 30), difficult=f"<difficult>{text}</difficult>")
        for number, text in enumerate(texts)
    ]
    folder.add("a", *objects)
    records, report = folder.read()
    assert [item["difficult"] for item in records["a"]["annotations"]] == [1, 0, 1, 0, 1, 0]
    assert kinds(report) == {("difficult missing", "taken as 0"): 1}


def test_namespaces_second_boxes_and_outlines_are_read_or_named(folder):
    folder.add("plain", box_xml())
    path = folder.root / "Annotations/plain.xml"
    path.write_text(path.read_text().replace("<annotation>", '<annotation xmlns="http://a/b">'))
    second = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    polygon = "<polygon><x1>5</x1><y1>8</y1><x2>15</x2><y2>7</y2><x3>9</x3><y3>20</y3></polygon>"
    rotated = (
        "<robndbox><cx>30</cx><cy>20</cy><w>20</w><h>10</h><angle>1.5707963267948966</angle>"
        "</robndbox>"
    )
    folder.add(
        "a",
        box_xml().replace("</object>", second),
        f"<object><name>cat</name><difficult>0</difficult>{polygon}</object>",
        f"<object><name>cat</name><difficult>0</difficult>{rotated}</object>",
        box_xml(box=(7, 7, 20, 20)),
        box_xml(box=(7, 7, 20, 20)),
    )
    folder.add("other")
    (folder.root / "Annotations/other.xml").write_text("<svg><g/></svg>")
    records, report = folder.read()
    assert boxes(records["plain"]) == [[1, 2, 20, 30]]
    np.testing.assert_allclose(
        boxes(records["a"]), [[1, 2, 20, 30], [4, 6, 15, 20], [24, 9, 35, 30], [6, 6, 20, 20]]
    )
    assert kinds(report) == {
        ("object with several boxes", "the first taken"): 1,
        ("object without a box", "taken around its outline"): 2,
        ("object listed twice", "taken once"): 1,
        ("annotation unreadable (its root is <svg>, not <annotation>)", "image skipped"): 1,
    }


def test_an_image_is_never_taken_for_another(folder):
    """By suffix where two have a name, by spelling, and never one that is another's."""
    for name in ("a", "b", "Upper", "copied", "copied2", "named"):
        folder.add(name, box_xml(), image=Image.new("RGB", (64, 48)))
    annotations, images = folder.root / "Annotations", folder.root / "JPEGImages"
    for name in ("a", "b"):
        Image.new("RGB", (64, 48), "white").save(images / f"{name}.png")
    for name, filename in {
        "a": "a.png",
        "copied": "a.jpg",
        "copied2": "x.jpg",
        "named": "x2.jpg",
    }.items():
        text = (annotations / f"{name}.xml").read_text()
        text = text.replace("<annotation>", f"<annotation><filename>{filename}</filename>")
        (annotations / f"{name}.xml").write_text(text)
    (images / "Upper.jpg").rename(images / "upper.JFIF")
    (images / "copied.jpg").unlink()
    (images / "copied2.jpg").rename(images / "stray.jpg")
    (images / "named.jpg").rename(images / "x2.jpg")
    records, report = folder.read()
    assert {key: record["file_name"].rpartition("/")[2] for key, record in records.items()} == {
        "a": "a.png",
        "Upper": "upper.JFIF",
        "named": "x2.jpg",
    }
    assert kinds(report) == {
        ("several images of one name", "image skipped"): 1,
        ("image name in another spelling", "found"): 1,
        ("image missing", "image skipped"): 2,
    }


def test_normalised_corners_are_recognised_over_the_data_set(folder):
    folder.add("a", *(box_xml(box=(0.1, 0.2, 0.3 + n / 10, 0.9)) for n in range(4)))
    with pytest.raises(UserError, match="4 of 4 boxes lie between 0 and 1, so they are normalised"):
        folder.read()
    folder.add("b", *(box_xml(box=(1, 2, 9 + n, 12)) for n in range(6)))
    records, report = folder.read()
    assert len(boxes(records["a"])) == 0
    assert kinds(report) == {("box between 0 and 1, not in pixels", "object skipped"): 4}


def test_rounding_is_one_line_and_no_finding(folder):
    folder.add("a", box_xml(box=(0.6, 0.9, 20, 48.4)), box_xml(box=(9, 9, 20, 48.6)))
    records, report = folder.read()
    assert boxes(records["a"]) == [[0, 0, 20, 48], [8, 8, 20, 48]]
    assert kinds(report) == {("box partly outside the image", "clipped to the image"): 1}
    assert "note: rounding puts 1 box up to half a pixel outside" in report.summary()


LAYOUTS = {
    "side by side": ("{}.xml", "{}.jpg"),
    "annots": ("annots/{}.xml", "images/{}.jpg"),
    "label/image": ("label/{}.xml", "image/{}.jpg"),
    "images inside annots": ("annots/{}.xml", "annots/images/{}.jpg"),
    "Annotations and images": ("Annotations/{}.xml", "Images/{}.jpg"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_found_by_itself(tmp_path, layout):
    for number in range(1, 4):
        text = f"<annotation>{size_xml(64, 48)}{box_xml(box=(number, 3, 20, 30))}</annotation>"
        xml, image = (tmp_path / form.format(f"IMG {number}") for form in LAYOUTS[layout])
        for path in (xml, image):
            path.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(text)
        Image.new("L", (64, 48)).save(image)
    (tmp_path / "._IMG 1.xml").write_bytes(b"\0\5\26\7")
    records = DatasetCatalog.get(register(f"voc:{tmp_path}:all", strict=True))
    assert [boxes(record) for record in records] == [[[n - 1, 2, 20, 30]] for n in range(1, 4)]
    (tmp_path / "train.txt").write_text("IMG 2\nIMG 3.jpg\n")
    records = DatasetCatalog.get(register(f"voc:{tmp_path}:train", strict=True))
    assert [record["image_id"] for record in records] == ["IMG 2", "IMG 3"]


def test_folders_of_side_by_side_files_are_splits(tmp_path):
    for split, name in (("train", "1"), ("train", "2"), ("valid", "1")):
        (tmp_path / split).mkdir(exist_ok=True)
        Image.new("L", (64, 48)).save(tmp_path / split / f"{name}.jpg")
        text = f"<annotation>{box_xml()}{size_xml(64, 48)}</annotation>"
        (tmp_path / split / f"{name}.xml").write_text(text)
    Image.new("L", (64, 48)).save(tmp_path / "train/no_xml.jpg")
    name = register(f"voc:{tmp_path}:train")
    assert [record["image_id"] for record in DatasetCatalog.get(name)] == ["train/1", "train/2"]
    (finding,) = dataset_report(name).findings
    assert (finding.kind, finding.file) == ("image without an annotation", "train/no_xml.jpg")
    assert len(DatasetCatalog.get(register(f"voc:{tmp_path}:valid", strict=True))) == 1
    with pytest.raises(UserError, match="1 x image without an annotation: passed over"):
        register(f"voc:{tmp_path}:all", strict=True)
    with pytest.raises(UserError, match="no split 'test' .*: train, valid, all; or a share"):
        register(f"voc:{tmp_path}:test")
    with pytest.raises(UserError, match="holds no XML file"):
        register(f"voc:{(tmp_path / 'empty').mkdir() or tmp_path / 'empty'}:all")


def test_a_share_and_its_rest_are_a_stratified_split(folder):
    for number in range(40):
        folder.add(f"{number:02}", box_xml("rare" if number % 10 == 0 else "common"))
    names = [register(f"voc:{folder.root}:{share}") for share in ("75%", "75%-rest")]
    first, rest = (
        {record["image_id"]: record["annotations"] for record in DatasetCatalog.get(name)}
        for name in names
    )
    assert (len(first), len(rest)) == (30, 10)
    assert not first.keys() & rest.keys()
    assert [sum(a[0]["category_id"] == 1 for a in part.values()) for part in (first, rest)] == [
        3,
        1,
    ]
    again = {record["image_id"] for record in DatasetCatalog.get(register(names[0]))}
    assert again == first.keys()
    folder.read("train")
    assert len(DatasetCatalog.get(register(f"voc:{folder.root}:train:50%"))) == 20
    for share in ("0%", "100%"):
        with pytest.raises(UserError, match="a share is above 0 % and below 100 %"):
            register(f"voc:{folder.root}:{share}")


@pytest.mark.parametrize(
    "xml",
    [
        "<annotation>{size}<Object><Name>cat</Name><BndBox>{box}</BndBox></Object></annotation>",
        "<annotation>{size}<objects><object><name>cat</name><bndbox>{box}</bndbox></object>"
        "</objects></annotation>",
        "<annotation>{size}<object><name>cat</name>"
        '<bndbox xmin="2" ymin="3" xmax="20" ymax="30"/></object></annotation>',
    ],
    ids=["capitals", "a list of objects", "attributes"],
)
def test_objects_written_in_another_way_are_read(folder, xml):
    folder.add("1", box_xml())
    expected = boxes(folder.read()[0]["1"])
    box = "<xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>30</ymax>"
    text = xml.format(size=size_xml(64, 48), box=box)
    (folder.root / "Annotations/1.xml").write_text(text)
    assert boxes(folder.read()[0]["1"]) == expected


def test_linked_folders_are_searched_and_a_link_back_is_not(folder, tmp_path):
    folder.add("1", box_xml())
    flat, other = tmp_path / "flat", tmp_path / "other"
    flat.mkdir()
    other.mkdir()
    (folder.root / "Annotations/1.xml").rename(flat / "1.xml")
    (folder.root / "JPEGImages/1.jpg").rename(flat / "1.jpg")
    for place, target in ((other / "train", flat), (flat / "back", flat), (flat / "up", other)):
        place.symlink_to(target)
    (record,) = DatasetCatalog.get(register(f"voc:{other}:train"))
    assert boxes(record) == [[1.0, 2.0, 20.0, 30.0]]


def test_classes_that_differ_in_case_alone_are_noted(folder):
    folder.add("1", box_xml("cat"), box_xml("Cat", (30, 5, 40, 9)))
    _, report = folder.read()
    assert report.classes == ["Cat", "cat"]
    assert report.notes == ["the classes Cat and cat differ in case alone: they stay two classes"]

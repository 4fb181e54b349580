"""The YOLO reader: boxes against the pixels they were written from, and layouts as tools write."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, read_image
from PIL import Image

import moco_det  # noqa: F401
from moco_common.errors import UserError
from moco_det.data.register import dataset_report, register

WIDTH, HEIGHT = 64, 48
NAMES = "names: [cat, dog]\n"
LINE = "0 0.5 0.5 0.25 0.5"


def add(root, image, label, *lines, picture=None, **save):
    for path in (root / image, root / label):
        path.parent.mkdir(parents=True, exist_ok=True)
    (picture or Image.new("L", (WIDTH, HEIGHT))).save(root / image, **save)
    if lines:
        (root / label).write_text("\n".join(lines) + "\n")


def read(spec, **options):
    """(records by image id, report, metadata)"""
    name = register(spec, **options)
    records = {record["image_id"]: record for record in DatasetCatalog.get(name)}
    return records, dataset_report(name), MetadataCatalog.get(name)


def kinds(report):
    return {(kind, action): len(found) for (kind, action), found in report.groups().items()}


@pytest.mark.parametrize("orientation", [1, 6])
def test_boxes_and_outlines_lie_on_the_pixels_they_are_about(tmp_path, orientation):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[12:36, 24:40] = 255
    exif = Image.Exif()
    exif[274] = orientation
    add(tmp_path, "images/a.png", "labels/a.txt", picture=Image.fromarray(pixels), exif=exif)
    seen = read_image(tmp_path / "images/a.png", "L")[..., 0] > 0
    height, width = seen.shape
    y, x = np.nonzero(seen)
    x0, y0, x1, y1 = (
        x.min() / width,
        y.min() / height,
        (x.max() + 1) / width,
        (y.max() + 1) / height,
    )
    box = f"1 {(x0 + x1) / 2:.6f} {(y0 + y1) / 2:.6f} {x1 - x0:.6f} {y1 - y0:.6f}"
    outline = f"0 {x0} {y0} {x1} {y0} {x1} {y1} {x0} {y1}"
    (tmp_path / "labels/a.txt").write_text(f"{outline}\n")
    (tmp_path / "data.yaml").write_text(NAMES)
    records, report, metadata = read(f"yolo:{tmp_path}:all")
    (item,) = records["images/a"]["annotations"]
    expected = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    np.testing.assert_allclose(item["bbox"], expected, atol=1e-3)
    mask = annotations_to_instances([item], seen.shape, mask_format="polygon").gt_masks
    assert mask.area().item() == pytest.approx(seen.sum())
    (tmp_path / "labels/a.txt").write_text(f"{outline}\n{box}\n")
    records, report, metadata = read(f"yolo:{tmp_path}:all", masks=False)
    assert report.findings == []
    (first, second) = records["images/a"]["annotations"]
    np.testing.assert_allclose(second["bbox"], expected, atol=1e-3)
    assert (first["category_id"], second["category_id"]) == (0, 1)
    assert first["area"] == pytest.approx(second["area"], abs=0.1)
    assert (records["images/a"]["width"], records["images/a"]["height"]) == (width, height)
    assert metadata.thing_dataset_id_to_contiguous_id == {0: 0, 1: 1}
    assert (metadata.evaluator_type, metadata.has_masks) == ("coco", False)


LAYOUTS = {
    "images/SPLIT": ("images/{}/1.jpg", "labels/{}/1.txt", NAMES),
    "SPLIT/images": ("{}/images/1.jpg", "{}/labels/1.txt", NAMES + "train: ../train/images\n"),
    "side by side": ("{}/1.jpg", "{}/1.txt", NAMES),
    "a list": (
        "pics/images/{}1.jpg",
        "pics/labels/{}1.txt",
        NAMES + "train: train.txt\nval: v.txt",
    ),
    "a path from elsewhere": (
        "images/{}/1.jpg",
        "labels/{}/1.txt",
        NAMES + "path: /content/data\ntrain: images/train\nval: [images/valid]",
    ),
    "numbered names": ("images/{}/1.jpg", "labels/{}/1.txt", "names: {0: cat, 1: dog}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_found_by_itself(tmp_path, layout):
    image, label, description = LAYOUTS[layout]
    (tmp_path / "data.yaml").write_text(description)
    for split, colour in (("train", 1), ("valid", 2)):
        picture = Image.new("L", (WIDTH, HEIGHT), colour)
        add(tmp_path, image.format(split), label.format(split), LINE, picture=picture)
    (tmp_path / "train.txt").write_text("./pics/images/train1.jpg\n")
    (tmp_path / "v.txt").write_text("/content/pics/images/valid1.jpg\n")
    for split, colour in (("train", 1), ("val", 2), ("valid", 2)):
        records, _, metadata = read(f"yolo:{tmp_path}:{split}", strict=True)
        ((_, record),) = records.items()
        assert read_image(record["file_name"], "L")[0, 0, 0] == colour
        assert [item["bbox"] for item in record["annotations"]] == [[24, 12, 40, 36]]
        assert metadata.thing_classes == ["cat", "dog"]
    assert len(read(f"yolo:{tmp_path}:all")[0]) == 2
    parts = [read(f"yolo:{tmp_path}:{share}")[0].keys() for share in ("50%", "50%-rest")]
    assert [len(part) for part in parts] == [1, 1]
    assert parts[0] != parts[1]
    with pytest.raises(UserError, match="no images of the split 'test' .*train"):
        register(f"yolo:{tmp_path}:test")


def test_lines_are_skipped_by_name(tmp_path):
    add(
        tmp_path,
        "images/a.jpg",
        "labels/a.txt",
        LINE,
        LINE,
        "1 0.9 0.5 0.25 0.5",
        "1 1.001 0.5 0.5 0.5",
        "5 0.5 0.5 0.25 0.5",
        "0.5 0.5 0.5 0.25 0.5",
        "0 0.5 0.5 0.25",
        "0 0.5 x 0.25 0.5",
        "0 0.5 nan 0.25 0.5",
        "0 0.5 0.5 0 0.5",
        "0 30 20 10 10",
        "",
        "0 0.1 0.1 0.5 0.1 0.5 0.5 0.2",
        *(f"1 0.5 0.5 0.{n} 0.5" for n in range(1, 9)),
    )
    add(tmp_path, "images/b.jpg", "labels/b.txt")
    (tmp_path / "labels/c.txt").write_text(LINE)
    (tmp_path / "images/d.jpg").write_bytes(b"no image")
    (tmp_path / "data.yaml").write_text(NAMES)
    records, report, _ = read(f"yolo:{tmp_path}:all")
    assert [item["bbox"] for item in records["images/a"]["annotations"]][:3] == [
        [24, 12, 40, 36],
        [49.6, 12, 64, 36],
        pytest.approx([48.064, 12, 64, 36]),
    ]
    assert len(records["images/a"]["annotations"]) == 11
    assert records["images/b"]["annotations"] == []
    line = "line that is neither 'class cx cy w h' nor 'class x0 y0 x1 y1 x2 y2 ...'"
    assert kinds(report) == {
        ("object listed twice", "taken once"): 1,
        ("box partly outside the image", "clipped to the image"): 2,
        ("class 5 without a name", "object skipped"): 1,
        ("class 0.5 without a name", "object skipped"): 1,
        (line, "object skipped"): 4,
        ("box empty", "object skipped"): 1,
        ("coordinates outside 0 to 1", "object skipped"): 1,
        ("label file missing", "taken as without objects"): 1,
        ("image unreadable", "image skipped"): 1,
        ("image missing", "labels skipped"): 1,
    }


def test_keypoints_are_left_and_said(tmp_path):
    (tmp_path / "data.yaml").write_text(NAMES + "kpt_shape: [2, 3]\n")
    add(tmp_path, "images/a.jpg", "labels/a.txt", LINE + " 0.5 0.5 2 0.6 0.6 1")
    records, report, _ = read(f"yolo:{tmp_path}:all", strict=True)
    assert records["images/a"]["annotations"][0]["bbox"] == [24, 12, 40, 36]
    assert "note: keypoints are not read" in report.summary()


def test_classes_without_a_description_are_listed_or_numbered(tmp_path):
    add(tmp_path, "a.jpg", "a.txt", LINE, "2 0.5 0.5 0.5 0.5")
    _, report, metadata = read(f"yolo:{tmp_path}:all", strict=True)
    assert metadata.thing_classes == ["class 0", "class 1", "class 2"]
    assert "note: no file names the classes" in report.summary()
    (tmp_path / "classes.txt").write_text("cat\n\nden haag\ndog\n")
    metadata = read(f"yolo:{tmp_path}:all", strict=True)[2]
    assert metadata.thing_classes == ["cat", "den haag", "dog"]


def test_mistakes_are_one_clear_sentence(tmp_path):
    add(tmp_path, "images/a.jpg", "labels/a.txt", "0 30 20 10 10", "1 20 10 10 10", LINE)
    (tmp_path / "data.yaml").write_text(NAMES)
    with pytest.raises(
        UserError, match="2 of 3 objects have coordinates outside 0 to 1, so they are"
    ):
        register(f"yolo:{tmp_path}:all")
    for text, message in {
        "names: 5": "'names' must be a list",
        "names: [a, a]": "holds a class name twice",
        "names: {0: a, x: b}": "'names' must be a list",
        "names: [a": "cannot read .*data.yaml",
        "names: &a [*a, *a]": "an alias inside itself",
        "names: []": "'names' must be a list",
    }.items():
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            register(f"yolo:{tmp_path}:all")
        assert "\n" not in str(caught.value)
    (tmp_path / "labels/a.txt").unlink()
    (tmp_path / "data.yaml").write_text(NAMES)
    with pytest.raises(
        UserError, match="none of 1 image has a label file .looked for .*labels/a.txt"
    ):
        register(f"yolo:{tmp_path}:all")
    with pytest.raises(UserError, match="does not exist"):
        register(f"yolo:{tmp_path}/absent:all")
    with pytest.raises(UserError, match="write voc:DIR:SPLIT"):
        register("yolo:train")


POSE = "0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 1 0.5 0.5 0 0.45 0.6 2"


@pytest.mark.parametrize("count", [1, 12])
def test_poses_without_a_description_are_boxes_not_outlines(tmp_path, count):
    """x, y and visibility of 4 keypoints after the box: 16 numbers, as many as 8 corners have."""
    for number in range(count):
        add(tmp_path, f"{number}.png", f"{number}.txt", POSE)
    records, report, metadata = read(f"yolo:{tmp_path}:all")
    expected = [0.3 * WIDTH, 0.3 * HEIGHT, 0.7 * WIDTH, 0.7 * HEIGHT]
    np.testing.assert_allclose(records["0"]["annotations"][0]["bbox"], expected)
    assert not metadata.has_masks
    assert any("keypoints are not read" in note for note in report.notes)


def test_poses_without_visibility_are_told_from_outlines_over_many_lines(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(10):
        points = " ".join(f"{v:.3f}" for v in rng.uniform(0.41, 0.59, 10))
        add(tmp_path, f"{number}.png", f"{number}.txt", f"0 0.5 0.5 0.2 0.2 {points}")
    records, _, metadata = read(f"yolo:{tmp_path}:all")
    expected = [0.4 * WIDTH, 0.4 * HEIGHT, 0.6 * WIDTH, 0.6 * HEIGHT]
    np.testing.assert_allclose(records["3"]["annotations"][0]["bbox"], expected)
    assert not metadata.has_masks


def test_oriented_boxes_are_the_upright_boxes_around_them(tmp_path):
    add(tmp_path, "a.png", "a.txt", "0 0.5 0.2 0.8 0.5 0.5 0.8 0.2 0.5")
    records, report, _ = read(f"yolo:{tmp_path}:all", masks=False)
    expected = [0.2 * WIDTH, 0.2 * HEIGHT, 0.8 * WIDTH, 0.8 * HEIGHT]
    np.testing.assert_allclose(records["a"]["annotations"][0]["bbox"], expected)
    assert any("oriented boxes count as the upright boxes" in note for note in report.notes)


def test_saved_predictions_are_not_taken_for_annotations(tmp_path):
    add(tmp_path, "a.png", "a.txt", f"{LINE} 0.91", f"{LINE} 0.4")
    with pytest.raises(UserError, match="2 of 2 lines have six numbers, as saved predictions"):
        register(f"yolo:{tmp_path}:all")


def test_folders_in_capitals_are_found(tmp_path):
    add(tmp_path, "Images/a.png", "Labels/a.txt", LINE)
    records, report, _ = read(f"yolo:{tmp_path}:all")
    assert len(records["Images/a"]["annotations"]) == 1
    assert report.findings == []


COMMA_LINES = {
    "decimal commas": "1 0,5 0,5 0,25 0,5",
    "a whole number among them": "1\t0,5\t0,5\t0,25\t1",
    "commas between": "1,0.5,0.5,0.25,0.5",
    "commas and blanks between": "1, 0.5, 0.5, 0.25, 0.5",
}


@pytest.mark.parametrize("form", COMMA_LINES)
def test_commas_are_read_where_they_have_one_meaning(tmp_path, form):
    add(tmp_path, "a.png", "a.txt", COMMA_LINES[form])
    (tmp_path / "data.yaml").write_text(NAMES)
    records, report, _ = read(f"yolo:{tmp_path}:all", strict=True)
    (item,) = records["a"]["annotations"]
    whole = form.startswith("a whole")
    assert item["bbox"] == [24, 0 if whole else 12, 40, 48 if whole else 36]
    assert item["category_id"] == 1
    assert ["labels contain commas" in note for note in report.notes] == [True]


@pytest.mark.parametrize("line", ["0,0,5,0,5,0,25,0,5", "0 0,5 0.5 0.25 0.5", "0 0,5,0,5 0,25,0,5"])
def test_commas_of_two_meanings_are_not_guessed(tmp_path, line):
    add(tmp_path, "a.png", "a.txt", LINE, line)
    (tmp_path / "data.yaml").write_text(NAMES)
    records, report, _ = read(f"yolo:{tmp_path}:all")
    assert [item["bbox"] for item in records["a"]["annotations"]] == [[24, 12, 40, 36]]
    assert [finding.object for finding in report.findings] == ["line 2"]

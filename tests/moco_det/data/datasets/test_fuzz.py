"""Damaged annotation files: one clear sentence or the right boxes, whatever was changed in them.

Each box that a reader keeps is compared with what the damaged file itself says, read anew by the
plainest code. ``soak_readers.py`` runs the same properties for longer.
"""

import copy
import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, transforms
from detectron2.data.detection_utils import annotations_to_instances, transform_instance_annotations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

import moco_det  # noqa: F401
from moco_common.errors import UserError
from moco_det.data.datasets.findings import DatasetReport
from moco_det.data.datasets.voc import VOCFolder
from moco_det.data.register import register

WIDTH, HEIGHT = 64, 48
QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 3, 48, 64, 2**31, 10**30, 0.5, -7.25, 1e308, math.inf, math.nan]),
    st.text(max_size=3),
    st.sampled_from(["", "person", "5", "1e3", "../../x", "a\0b", "ü", "left_eye"]),
    st.lists(st.integers(-3, 70), max_size=6),
    st.dictionaries(st.sampled_from(["id", "size", "counts"]), st.integers(0, 70), max_size=2),
)


def rle(x, y, w, h):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    pixels[y : y + h, x : x + w] = 1
    code = coco_mask.encode(pixels)
    return {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}


def coco_file():
    square = [10, 20, 30, 20, 30, 40, 10, 40]
    image = {"width": WIDTH, "height": HEIGHT}
    objects = [
        {"bbox": [10, 20, 20, 20], "segmentation": [square], "area": 400, "image_id": 1},
        {"bbox": [-3, 5, 18, 10], "segmentation": rle(0, 5, 15, 10), "image_id": 2},
        {"bbox": [60, 40, 30, 30], "segmentation": [square, square], "image_id": 2, "iscrowd": 1},
        {"bbox": [0, 0, 64, 48], "segmentation": rle(0, 0, 64, 48), "image_id": 3},
    ]
    points = {"keypoints": [5, 6, 2, 60, 40, 1, 0, 0, 0], "num_keypoints": 2}
    return {
        "images": [{"id": key, "file_name": f"{key}.png", **image} for key in (1, 2, 3)],
        "annotations": [
            {"id": number, "category_id": 3 + number % 2, **item, **points}
            for number, item in enumerate(objects, 1)
        ],
        "categories": [
            {"id": 3, "name": "cat", "keypoints": ["nose", "left_eye", "right_eye"]},
            {"id": 4, "name": "dog", "skeleton": [[1, 2], [2, 3]]},
        ],
    }


def places(node, path=()):
    """Paths to every value inside nested lists and dicts."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


@st.composite
def damaged_json(draw):
    """A COCO file with one to four values replaced, removed, doubled or swapped; or bytes lost."""
    content = coco_file()
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(sorted(places(content), key=str)))
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "double", "swap"]))
        if action == "replace":
            holder[path[-1]] = draw(VALUES)
        elif action == "remove":
            del holder[path[-1]]
        elif action == "double" and isinstance(holder, list):
            holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
        elif action == "swap" and isinstance(holder, list):
            holder.reverse()
    data = json.dumps(content).encode()
    if draw(st.integers(0, 4)) == 0:
        at, count = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = data[:at] + draw(st.binary(max_size=2)) + data[at + count :]
    return data


def clipped(x0, y0, x1, y1):
    return (max(x0, 0), max(y0, 0), min(x1, WIDTH), min(y1, HEIGHT))


def numbers(value, count):
    return isinstance(value, list) and len(value) == count and all(
        isinstance(v, (int, float)) and math.isfinite(v) for v in value
    )  # fmt: skip


def check_coco(folder, data):
    """Register the file; whatever is kept must be what it says. Returns whether it was read."""
    (folder / "own.json").write_bytes(data)
    try:
        name = register(f"coco:{folder / 'own.json'}:{folder}")
    except UserError:
        return False
    content = json.loads(data)
    entries = [a for a in content["annotations"] if isinstance(a, dict)]
    sizes = {i["id"]: (i.get("width"), i.get("height")) for i in content["images"]
             if isinstance(i, dict) and isinstance(i.get("id"), (int, str))}  # fmt: skip
    metadata = MetadataCatalog.get(name)
    for record in DatasetCatalog.get(name):
        assert (record["width"], record["height"]) == (WIDTH, HEIGHT)
        own = [a for a in entries if str(a.get("image_id")) == str(record["image_id"])]
        size = sizes.get(record["image_id"], (WIDTH, HEIGHT))
        scales = [(1, 1)]
        if numbers(list(size), 2) and min(size) > 0:  # another size of the same shape
            scales.append((WIDTH / size[0], HEIGHT / size[1]))
        stated = set()
        for x, y in scales:
            for a in own:
                if numbers(a.get("bbox"), 4):
                    bx, by, bw, bh = a["bbox"]
                    across, down = sorted((bx, bx + bw)), sorted((by, by + bh))  # sizes may be < 0
                    box = clipped(across[0] * x, down[0] * y, across[1] * x, down[1] * y)
                    stated.add(tuple(np.round(np.float64(box), 6)))
        for item in record["annotations"]:
            x0, y0, x1, y1 = item["bbox"]
            assert 0 <= x0 < x1 <= WIDTH
            assert 0 <= y0 < y1 <= HEIGHT
            without = any(not a.get("bbox") for a in own)  # then it is taken from the mask
            assert tuple(np.round(item["bbox"], 6)) in stated or without
            assert 0 <= item["category_id"] < len(metadata.thing_classes)
            assert item["area"] > 0
            assert ("segmentation" in item) == metadata.has_masks
            names = metadata.get("keypoint_names")
            assert len(item.get("keypoints", ())) == 3 * len(names or ())
            assert np.isfinite(item.get("keypoints", [0])).all()
        # What training makes of the whole record: nothing in it can break a run.
        unchanged = transforms.TransformList([])
        flip = np.arange(len(metadata.get("keypoint_names") or ()))
        items = [
            transform_instance_annotations(
                item, unchanged, (HEIGHT, WIDTH), keypoint_hflip_indices=flip
            )
            for item in record["annotations"]
        ]
        instances = annotations_to_instances(items, (HEIGHT, WIDTH), metadata.mask_format)
        assert len(instances) == len(items)
    return True


@pytest.fixture
def images(tmp_path):
    for key in (1, 2, 3):
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / f"{key}.png")
    return tmp_path


def test_the_undamaged_file_is_read_without_a_finding_but_the_one_in_it(images):
    assert check_coco(images, json.dumps(coco_file()).encode())


@QUICK
@given(data=damaged_json())
def test_damaged_json_gives_a_clear_sentence_or_the_boxes_it_states(images, data):
    check_coco(images, data)


OBJECT = (
    "<object><name>{}</name><pose>Left</pose><difficult>{}</difficult><bndbox><xmin>{}</xmin>"
    "<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
XML = (
    f"<annotation><filename>1.jpg</filename><size><width>{WIDTH}</width><height>{HEIGHT}</height>"
    "<depth>3</depth></size>{}</annotation>"
).format(
    "".join(
        OBJECT.format(*values)
        for values in (("cat", 0, 2, 3, 20, 30), ("dog", 1, 40, 8, 64, 48), ("cat", 0, -3, 0, 5, 5))
    )
    # Of doubled elements the first counts.
    + OBJECT.format("cat", 0, 7, 7, 30, 30).replace("</object>", "<name>dog</name></object>")
    + OBJECT.format("cat", 0, 9, 9, 30, 30).replace("</bndbox>", "<xmin>1</xmin></bndbox>")
)
TEXTS = st.sampled_from(
    [*"0 1 -4 70 1e9 nan inf 7.5 0x7 cat é".split(), "", " ", "9" * 400],
)


@st.composite
def damaged_xml(draw):
    """A VOC annotation with texts replaced, elements removed, doubled or renamed; or bytes lost."""
    root = ET.fromstring(XML)
    for _ in range(draw(st.integers(1, 4))):
        parents = [node for node in root.iter() if len(node)]
        parent = draw(st.sampled_from(parents))
        child = draw(st.sampled_from(list(parent)))
        action = draw(st.sampled_from(["text", "text", "text", "remove", "double", "rename"]))
        if action == "text":
            child.text = draw(TEXTS)
        elif action == "remove" and len(parent) > 1:
            parent.remove(child)
        elif action == "double":
            parent.insert(draw(st.integers(0, len(parent))), copy.deepcopy(child))
        elif action == "rename":
            child.tag = draw(st.sampled_from(["object", "xmin", "name", "bndbox", "Name"]))
    data = ET.tostring(root)
    if draw(st.integers(0, 3)) == 0:
        at, count = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = data[:at] + draw(st.binary(max_size=2)) + data[at + count :]
    return data


def check_voc(folder, data):
    """As :func:`check_coco`, of one annotation."""
    (folder / "Annotations" / "1.xml").write_bytes(data)
    report = DatasetReport("fuzz")
    try:
        records, classes = VOCFolder(folder).read("all", report)
    except UserError:
        return False
    if not records:
        assert report.findings
        return False
    (record,) = records
    assert (record["width"], record["height"]) == (WIDTH, HEIGHT)
    root = ET.fromstring(data)
    scales = [(1.0, 1.0)]
    try:
        size = [round(float(root.findtext(f"size/{key}"))) for key in ("width", "height")]
        scales.append((WIDTH / size[0], HEIGHT / size[1]))
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        pass
    stated = set()
    for obj in root.findall("object"):
        try:
            x0, y0, x1, y1 = (
                float(obj.findtext(f"bndbox/{c}")) for c in ("xmin", "ymin", "xmax", "ymax")
            )
        except (TypeError, ValueError):
            continue
        x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
        for x, y in scales:
            box = clipped((x0 - 1) * x, (y0 - 1) * y, x1 * x, y1 * y)
            stated.add(((obj.findtext("name") or "").strip(), *np.round(box, 6)))
    for item in record["annotations"]:
        x0, y0, x1, y1 = item["bbox"]
        assert 0 <= x0 < x1 <= WIDTH
        assert 0 <= y0 < y1 <= HEIGHT
        assert (item["category_id"], *np.round(item["bbox"], 6)) in stated
        assert item["category_id"] in classes
        assert item["difficult"] in (0, 1)
    return True


@pytest.fixture
def voc_folder(tmp_path):
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / name).mkdir()
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "JPEGImages" / "1.jpg")
    return tmp_path


def test_the_undamaged_annotation_is_read(voc_folder):
    assert check_voc(voc_folder, XML.encode())


@QUICK
@given(data=damaged_xml())
def test_damaged_xml_gives_a_finding_or_the_boxes_it_states(voc_folder, data):
    check_voc(voc_folder, data)


LINES = [
    "0 0.5 0.5 0.25 0.5",
    "1 0.9 0.5 0.4 0.5",
    "1 0.1 0.1 0.6 0.2 0.5 0.9 0.2 0.8",
    "0 0.2 0.2 0.1 0.1",
]
WORDS = st.sampled_from([*"0 1 -1 2 0.5 0.999 1.001 1.5 20 1e9 nan inf x é".split(), "1e-9", ""])


@st.composite
def damaged_labels(draw):
    """Labels with one to four words replaced, removed or doubled; or bytes lost."""
    rows = [line.split() for line in LINES]
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.sampled_from([row for row in rows if row] or [["0"]]))
        at = draw(st.integers(0, len(row) - 1))
        action = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if action == "replace":
            row[at] = draw(WORDS)
        elif action == "remove":
            del row[at]
        else:
            row.insert(at, row[at])
    data = "\n".join(map(" ".join, rows)).encode()
    if draw(st.integers(0, 3)) == 0:
        at, count = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = data[:at] + draw(st.binary(max_size=2)) + data[at + count :]
    return data


def check_yolo(folder, data):
    """As :func:`check_coco`, of one label file."""
    (folder / "1.txt").write_bytes(data)
    try:
        name = register(f"yolo:{folder}:all", masks=False)
    except UserError:
        return False
    (record,) = [r for r in DatasetCatalog.get(name) if r["image_id"] == "1"]
    stated = set()
    for line in data.decode("utf-8-sig", errors="replace").splitlines():
        try:
            number, *values = map(float, line.split())
        except ValueError:
            continue
        if len(values) == 4:
            cx, cy, w, h = values
            corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        elif len(values) >= 6 and len(values) % 2 == 0:
            corners = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
        else:
            continue
        if all(map(math.isfinite, corners)):
            box = clipped(*np.multiply(corners, (WIDTH, HEIGHT) * 2))
            stated.add((number, *np.round(box, 6)))
    for item in record["annotations"]:
        x0, y0, x1, y1 = item["bbox"]
        assert 0 <= x0 < x1 <= WIDTH
        assert 0 <= y0 < y1 <= HEIGHT
        assert (item["category_id"], *np.round(item["bbox"], 6)) in stated
        assert item["area"] > 0
    return True


@pytest.fixture
def yolo_folder(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [cat, dog]")
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "1.jpg")
    return tmp_path


def test_the_undamaged_labels_are_read(yolo_folder):
    assert check_yolo(yolo_folder, "\n".join(LINES).encode())


@QUICK
@given(data=damaged_labels())
def test_damaged_labels_give_a_finding_or_the_boxes_they_state(yolo_folder, data):
    check_yolo(yolo_folder, data)

"""The class of every pixel, drawn and written: a real, narrow model on one's own images."""

import json
import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from matplotlib.axes import Axes
from PIL import Image
from pycocotools import mask as mask_codec

from moco_det.config.protocols import get_protocol, load_config
from moco_det.data.datasets.label_files import read_labels
from moco_det.data.register import register
from moco_det.inference.predictor import Segmenter, class_names, load_image, predictor_of_run
from moco_det.inference.video import read_frames
from moco_det.structures.label_map import UNLABELLED, LabelMap
from moco_det.visualization.label_maps import draw_labels, save_label_picture
from moco_det.visualization.palette import palette
from tests.moco_det.inference.test_predictor import make_run, write_video
from tools.predict import main

CLASSES = ["background", "cat", "dog"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "semantic"
    changes = {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3, "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8}
    changes |= {"DATASETS.CLASSES": CLASSES, "INPUT.MIN_SIZE_TEST": 0}
    _, model = make_run(folder, "VOC-semseg", **changes)
    with torch.no_grad():  # else one class wins everywhere
        model.sem_seg_head.predictor.weight.normal_(0, 0.05)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    return folder, model


@pytest.fixture
def photo(tmp_path):
    rng = np.random.default_rng(1)
    pixels = cv2.resize(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), (97, 65))
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/photo.png"), pixels)
    return tmp_path / "in/photo.png"


def test_pixels_have_the_class_that_the_model_gives_them_by_hand(run, photo):
    folder, model = run
    image = load_image(photo)
    with torch.no_grad():
        pixels = torch.from_numpy(image.transpose(2, 0, 1).astype("float32"))
        logits = model([{"image": pixels, "height": 65, "width": 97}])[0]["sem_seg"].numpy()
    found = predictor_of_run(folder)(image)
    assert (found.classes == logits.argmax(0)).all()
    weights = np.exp(logits - logits.max(0))
    np.testing.assert_allclose(found.scores, weights.max(0) / weights.sum(0), rtol=1e-4)
    cut = float(np.median(found.scores))
    sure = predictor_of_run(folder, cut)(image)
    assert ((sure.classes == UNLABELLED) == (found.scores < cut)).all()
    assert sum(found.shares().values()) == pytest.approx(1)
    assert 0.3 < sum(sure.shares().values()) < 0.7


def test_command_writes_pictures_labels_and_json(run, photo, capsys):
    """The labels are such as the package itself reads; areas and masks are theirs."""
    folder, _ = run
    (photo.parent / "photo-labels.png").write_bytes(photo.read_bytes())  # a name that is taken
    out = photo.parents[1] / "out"
    assert main(["--run", str(folder), str(photo.parent), "-o", str(out)]) is None
    said = capsys.readouterr().out
    assert re.search(r"\d+ class areas in 2 images", said)
    content = json.loads((out / "predictions.json").read_text())
    assert [c["name"] for c in content["categories"]] == CLASSES
    first = next(i for i in content["images"] if i["picture"] == "photo.png")
    assert first["labels"] == "photo-labels-2.png"
    labels = read_labels(out / first["labels"])
    assert (labels == predictor_of_run(folder)(load_image(photo)).classes).all()
    with Image.open(out / first["labels"]) as image:
        assert image.mode == "P"
        assert image.getpalette()[:6] == palette(2).reshape(-1).tolist()
    areas = [a for a in content["annotations"] if a["image_id"] == first["id"]]
    assert {a["category_id"] for a in areas} == set(np.unique(labels).tolist())
    for area in areas:
        mask = mask_codec.decode(area["segmentation"]).astype(bool)
        assert (mask == (labels == area["category_id"])).all()
        assert area["area"] == mask.sum()
        assert 1 / 3 <= area["score"] <= 1
        assert area["category_name"] == CLASSES[area["category_id"]]
    picture = cv2.imread(str(out / "photo.png"))
    assert picture.shape[1] == 320  # small images are shown larger
    assert picture.shape[0] > round(65 * 320 / 97)  # a legend below
    assert len({tuple(p) for p in picture[-12:].reshape(-1, 3).tolist()}) > 3
    # What was written is a data set.
    (out / "labels").mkdir()
    (out / first["labels"]).rename(out / "labels/photo.png")
    spec = f"semseg:{photo.parent}:{out / 'labels'}"
    assert len(DatasetCatalog.get(register(spec))) == 1


def test_a_video_is_drawn_and_has_one_entry_a_frame(run, tmp_path):
    folder, _ = run
    frames = [np.full((64, 96, 3), 40 * k, np.uint8) for k in range(3)]
    video = write_video(tmp_path / "clip.mp4", frames)
    out = tmp_path / "out"
    assert main(["--run", str(folder), str(video), "-o", str(out)]) is None
    content = json.loads((out / "predictions.json").read_text())
    assert [image["frame"] for image in content["images"]] == [0, 1, 2]
    assert {a["image_id"] for a in content["annotations"]} == {1, 2, 3}
    assert [f.shape for f in read_frames(out / "clip.mp4")] == [(64, 96, 3)] * 3
    assert sorted(p.name for p in out.iterdir()) == ["clip.mp4", "predictions.json"]


def test_background_and_unlabelled_pixels_are_not_tinted():
    image = np.full((80, 120, 3), 200, np.uint8)
    classes = np.zeros((80, 120), np.uint8)
    classes[:, 40:80] = 1
    classes[:, 80:] = UNLABELLED
    classes[70:72, 90:92] = 2  # tinted like large areas, but not named
    found = LabelMap(classes, np.ones((80, 120), np.float32))
    canvas = draw_labels(image, found, CLASSES)
    assert canvas.shape == image.shape
    named = slice(20, 60)  # rows in which names are written
    outside = np.delete(canvas, np.r_[named, 70:72], axis=0)[:, np.r_[:40, 80:120]]
    assert (outside == 200).all()
    for category, pixel in ((1, canvas[75, 60]), (2, canvas[71, 91])):
        expected = 0.45 * 200 + 0.55 * palette(3)[category].astype(float)
        np.testing.assert_allclose(pixel, expected, atol=2)
    assert np.ptp(canvas[named, 40:80], axis=(0, 1)).max() > 100  # the name
    assert (image == 200).all()
    assert found.shares() == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 4 / 9600})


def test_many_classes_cost_one_image_and_each_name_stands_on_its_class(monkeypatch):
    """An image per class made a video of 19 classes ten times slower."""
    names = [f"k{index}" for index in range(19)]
    classes = np.arange(19, dtype=np.uint8).repeat(16)[None, :].repeat(240, axis=0)
    images, places = [], {}
    imshow, text = Axes.imshow, Axes.text
    monkeypatch.setattr(Axes, "imshow", lambda *a, **k: images.append(1) or imshow(*a, **k))
    monkeypatch.setattr(
        Axes,
        "text",
        lambda s, x, y, name, **k: places.update({name: (x, y)}) or text(s, x, y, name, **k),
    )
    image = np.zeros((240, 304, 3), np.uint8)
    drawn = draw_labels(image, LabelMap(classes, np.ones(classes.shape, np.float32)), names)
    assert len(images) == 1
    assert {name: names[classes[int(y), int(x)]] for name, (x, y) in places.items()} == {
        name: name for name in names
    }
    expected = np.round(0.55 * palette(19)[classes[0]].astype(float))
    assert np.abs(drawn[-1] - expected).max() <= 1  # below the names


def test_colours_differ_and_a_legend_of_many_classes_fits(tmp_path):
    assert len({tuple(color) for color in palette(255).tolist()}) == 255
    assert (palette(40)[:12] == palette(12)).all()
    names = [f"a class with a very long name {k}" for k in range(60)]
    classes = np.arange(120 * 60, dtype=np.int64).reshape(120, 60) % 60
    found = LabelMap(classes.astype(np.uint8), np.ones((120, 60), np.float32))
    path = save_label_picture(np.zeros((120, 60, 3), np.uint8), found, names, tmp_path / "p.png")
    assert cv2.imread(str(path)).shape == (320 + 20 * 18 + 8, 160, 3)
    nothing = LabelMap(np.full((4, 4), UNLABELLED, np.uint8), np.zeros((4, 4), np.float32))
    assert save_label_picture(np.zeros((4, 4, 3), np.uint8), nothing, names, tmp_path / "q.png")


def test_names_of_classes_are_those_of_pixels():
    assert class_names(get_protocol("Cityscapes-semseg"))[:2] == ["road", "sidewalk"]
    cfg = load_config("VOC-semseg", ["DATASETS.CLASSES", str([f"k{i}" for i in range(21)])])
    assert class_names(cfg)[20] == "k20"
    assert Segmenter.__call__.__doc__

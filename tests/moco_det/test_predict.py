"""Prediction with a real, narrow detector: what it finds, writes, skips and refuses."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from pycocotools import mask as mask_codec

from moco_det.detector import fit_norms
from moco_det.errors import UserError
from moco_det.predict import build_predictor, class_names, find_images, load_image
from moco_det.protocols import get_protocol
from tools.predict import main

NARROW = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 16, "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 2,
    "MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 8,
    "INPUT.MIN_SIZE_TEST", 64, "DATASETS.CLASSES", ["cat", "dog"],
]  # fmt: skip


def make_run(folder, protocol, **changes):
    """A run directory as fine-tuning leaves it, of a detector with random weights."""
    cfg = get_protocol(protocol)
    cfg.merge_from_list(NARROW)
    cfg.merge_from_list([item for pair in changes.items() for item in pair])
    torch.manual_seed(0)
    model = build_model(fit_norms(cfg, 1)[0])
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict(), "iteration": 1}, folder / "model_final.pth")
    return cfg, model.eval()


@pytest.fixture(scope="module")
def box_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "voc"
    return folder, *make_run(folder, "VOC")


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), pixels)
    return tmp_path / "photo.png"


def test_detector_finds_what_the_model_finds_by_hand(box_run, photo):
    folder, cfg, model = box_run
    image = np.array(Image.open(photo))
    with torch.no_grad():
        pixels = torch.from_numpy(image.transpose(2, 0, 1).astype("float32"))
        expected = model([{"image": pixels, "height": 64, "width": 96}])[0]["instances"]
    detector = build_predictor(cfg, folder / "model_final.pth", threshold=0.05)
    found = detector(image)  # the short side is 64 already: nothing is resized
    assert len(found) == len(expected) > 0
    assert found.boxes == pytest.approx(expected.pred_boxes.tensor.numpy(), abs=1e-4)
    assert found.scores == pytest.approx(expected.scores.numpy(), abs=1e-6)


def test_boxes_are_in_the_pixels_of_the_image_given(box_run, photo):
    folder, cfg, _ = box_run
    detector = build_predictor(cfg, folder / "model_final.pth", threshold=0.05)
    small = load_image(photo)
    large = cv2.resize(small, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    there = detector(large)
    assert len(there) > 0
    assert there.boxes[:, 2].max() <= 384
    assert there.boxes[:, 2].max() > 96


def test_a_bgr_detector_is_given_bgr(box_run, photo):
    folder, cfg, _ = box_run
    other = cfg.clone()
    other.INPUT.FORMAT = "BGR"
    image = load_image(photo)
    by_rgb, by_bgr = (build_predictor(c, folder / "model_final.pth", 0.05) for c in (cfg, other))
    assert by_bgr(image[:, :, ::-1]).boxes == pytest.approx(by_rgb(image).boxes)


def test_threshold_drops_what_scores_less(box_run, photo):
    folder, cfg, _ = box_run
    image = load_image(photo)
    everything = build_predictor(cfg, folder / "model_final.pth", 0.0)(image)
    cut = float(np.median(everything.scores))
    kept = build_predictor(cfg, folder / "model_final.pth", cut)(image)
    assert 0 < len(kept) < len(everything)
    assert kept.scores.min() >= cut


def test_command_writes_pictures_and_coco_json_with_names(box_run, photo, capsys):
    folder, _, _ = box_run
    out = photo.parent / "out"
    arguments = ["--run", str(folder), str(photo), "-o", str(out), "--threshold", "0.05"]
    assert main(arguments) is None
    content = json.loads((out / "predictions.json").read_text())
    assert content["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    (image,) = content["images"]
    assert (image["width"], image["height"]) == (96, 64)
    assert cv2.imread(str(out / image["picture"])) is not None
    assert content["annotations"]
    for annotation in content["annotations"]:
        assert annotation["image_id"] == image["id"]
        assert annotation["category_name"] == ["cat", "dog"][annotation["category_id"]]
        x, y, width, height = annotation["bbox"]
        assert 0 <= x <= x + width <= 96.01
        assert 0 <= y <= y + height <= 64.01
    assert f"{len(content['annotations'])} objects in 1 images" in capsys.readouterr().out


def test_masks_are_written_as_run_lengths_of_the_image_size(tmp_path, photo):
    make_run(tmp_path / "run", "COCO-C4-1x")
    out = tmp_path / "out"
    assert (
        main(["--run", str(tmp_path / "run"), str(photo), "-o", str(out), "--threshold", "0"])
        is None
    )
    content = json.loads((out / "predictions.json").read_text())
    assert content["annotations"]
    for annotation in content["annotations"]:
        assert mask_codec.decode(annotation["segmentation"]).shape == (64, 96)


def test_unreadable_images_are_named_and_the_others_are_done(box_run, photo, capsys):
    folder, _, _ = box_run
    images = photo.parent / "images"
    images.mkdir()
    (images / "a.png").write_bytes(photo.read_bytes()[:200])
    (images / "b.png").write_bytes(photo.read_bytes())
    (images / "c.jpg").write_text("no picture")
    (images / "notes.txt").write_text("not looked at")
    out = photo.parent / "out"
    assert main(["--run", str(folder), str(images), "-o", str(out)]) == 1
    errors = capsys.readouterr().err
    assert "a.png is not readable" in errors
    assert "c.jpg is not readable" in errors
    content = json.loads((out / "predictions.json").read_text())
    assert [Path(i["file_name"]).name for i in content["images"]] == ["b.png"]
    assert [Path(f["file_name"]).name for f in content["failed"]] == ["a.png", "c.jpg"]
    assert (out / "b.png").exists()


def test_pictures_of_equal_names_do_not_replace_each_other(tmp_path):
    for name in ("x/a.jpg", "x/a.png", "x/deep/a.jpg", "y/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path / "x", tmp_path / "y", tmp_path / "y" / "a.jpg"])
    assert len(found) == 4
    assert [str(picture) for _, picture in found] == [
        "a.png", "a-2.png", "deep/a.png", "a-3.png"
    ]  # fmt: skip


def test_images_are_turned_as_their_exif_says(tmp_path):
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").shape == (30, 20, 3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode_are_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new(mode, (30, 20)).save(tmp_path / f"x.{suffix}")
    assert load_image(tmp_path / f"x.{suffix}").shape == (20, 30, 3)


def test_class_names_fall_back_to_the_data_set_then_to_numbers():
    cfg = get_protocol("VOC")
    assert class_names(cfg)[:2] == ["aeroplane", "bicycle"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    assert class_names(cfg) == ["class 0", "class 1"]


def test_nothing_found_is_one_clear_error(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="no image in"):
        find_images([tmp_path])
    with pytest.raises(UserError, match="no image or folder"):
        find_images([tmp_path / "missing"])


def test_weights_of_another_detector_are_refused(box_run):
    folder, cfg, _ = box_run
    other = cfg.clone()
    other.MODEL.ROI_HEADS.NUM_CLASSES = 5
    with pytest.raises(UserError, match="another detector"):
        build_predictor(other, folder / "model_final.pth")


def test_command_names_what_is_missing_in_one_line(box_run, photo, tmp_path, capsys):
    folder, _, _ = box_run
    for arguments, named in (
        (["--run", str(tmp_path)], "config.yaml"),
        (["--config", "VOC", "--weights", str(tmp_path / "none.pth")], "none.pth"),
        (["--run", str(folder), "--threshold", "7"], "--threshold"),
    ):
        assert main([*arguments, str(photo), "-o", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert named in error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("given", [[], ["--config", "VOC"], ["--run", "x", "--weights", "y"]])
def test_command_needs_a_run_or_a_config_with_weights(given, photo, capsys):
    with pytest.raises(SystemExit):
        main([*given, str(photo), "-o", "out"])
    assert "either --run" in capsys.readouterr().err

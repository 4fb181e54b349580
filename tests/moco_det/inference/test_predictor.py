"""Prediction with a real, narrow detector: what it finds, writes, skips and refuses."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from pycocotools import mask as mask_codec

from moco_common.errors import UserError
from moco_det.config.protocols import get_protocol
from moco_det.inference.predict_folder import predict
from moco_det.inference.predictor import (
    Detector,
    build_predictor,
    class_names,
    find_images,
    load_image,
    predictor_of_run,
)
from moco_det.inference.video import VideoFile, read_frames
from moco_det.modeling.detector import fit_norms
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
    assert f"{len(content['annotations'])} objects in 1 image: " in capsys.readouterr().out


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


@pytest.mark.parametrize("threshold", ["0", "1"])  # everything and nothing is found
def test_masks_are_predicted_on_images_two_pixels_wide(tmp_path, threshold):
    make_run(tmp_path / "run", "COCO-C4-1x", **{"INPUT.MAX_SIZE_TEST": 128})
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name, shape in {"a": (40, 2, 3), "b": (2, 40, 3), "c": (2, 2, 3)}.items():
        cv2.imwrite(str(images / f"{name}.png"), np.full(shape, 9, np.uint8))
    given = [str(images), "-o", str(out), "--threshold", threshold]
    assert main(["--run", str(tmp_path / "run"), *given]) is None
    content = json.loads((out / "predictions.json").read_text())
    assert (len(content["images"]), content["failed"]) == (3, [])
    assert bool(content["annotations"]) == (threshold == "0")


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


def test_thin_and_truncated_images_are_named_and_the_others_are_kept(box_run, tmp_path, capsys):
    folder, _, _ = box_run
    images = tmp_path / "images"
    images.mkdir()
    sizes = {"a": (3, 3000), "b": (3000, 3), "c": (1, 5000), "d": (5000, 1), "e": (1, 1)}
    for name, (height, width) in sizes.items():
        cv2.imwrite(str(images / f"{name}.png"), np.full((height, width, 3), 9, np.uint8))
    cv2.imwrite(str(images / "f.jpg"), np.random.default_rng(0).integers(0, 255, (64, 96, 3)))
    whole = (images / "f.jpg").read_bytes()
    (images / "g.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    out = tmp_path / "out"
    assert main(["--run", str(folder), str(images), "-o", str(out), "--quiet"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [Path(line.split()[1].strip(":")).name for line in errors] == ["c.png", "d.png", "g.jpg"]
    assert "5000 x 1 pixels are too thin" in errors[0]
    content = json.loads((out / "predictions.json").read_text())
    assert [Path(i["file_name"]).stem for i in content["images"]] == ["a", "b", "e", "f"]
    assert [f["error"] for f in content["failed"]] == [e.removeprefix("error: ") for e in errors]


@pytest.mark.parametrize("way", ["folder", "relative", "link", "hard link", "not an input"])
def test_a_photograph_is_never_replaced_by_its_drawing(box_run, photo, capsys, monkeypatch, way):
    folder, _, _ = box_run
    before, out, given = photo.read_bytes(), photo.parent, photo
    monkeypatch.chdir(photo.parent)
    if way == "relative":
        out, given = "sub/..", "./photo.png"
        (photo.parent / "sub").mkdir()
    elif way in ("link", "hard link"):
        out = photo.parent / "out"
        out.mkdir()
        (os.link if way == "hard link" else os.symlink)(photo, out / "photo.png")
    elif way == "not an input":
        given = photo.with_name("photo.jpg")
        cv2.imwrite(str(given), cv2.imread(str(photo)))
    assert main(["--run", str(folder), str(given), "-o", str(out)]) == 1
    error = capsys.readouterr().err
    assert "photo.png is not a drawing" in error
    assert len(error.splitlines()) == 1
    assert photo.read_bytes() == before
    assert not list(photo.parent.rglob("predictions.json"))


def test_a_video_and_a_coco_file_of_the_user_are_not_replaced(box_run, photo, capsys):
    folder, _, _ = box_run
    video = write_video(photo.with_name("clip.mp4"), [np.zeros((64, 96, 3), np.uint8)] * 2)
    before = video.read_bytes()
    assert main(["--run", str(folder), str(video), "-o", str(photo.parent)]) == 1
    assert video.read_bytes() == before
    own = photo.with_name("predictions.json")
    own.write_text('{"images": [], "categories": [], "annotations": []}')
    jpeg = photo.with_name("other.jpg")
    cv2.imwrite(str(jpeg), np.zeros((64, 96, 3), np.uint8))
    assert main(["--run", str(folder), str(jpeg), "-o", str(photo.parent)]) == 1
    assert "predictions.json is not a drawing" in capsys.readouterr().err
    assert "failed" not in own.read_text()


@pytest.mark.parametrize("out", [".", "drawn", "../elsewhere"])
def test_drawings_are_not_predicted_on_and_may_be_drawn_again(box_run, tmp_path, out, monkeypatch):
    folder, _, _ = box_run
    photos = tmp_path / "photos"
    photos.mkdir()
    monkeypatch.chdir(photos)
    cv2.imwrite("a.jpg", np.zeros((64, 96, 3), np.uint8))
    arguments = ["--run", str(folder), "-o", out]
    for given in (
        ["."],
        ["."],
        [str(photos)],
        sorted(p.name for p in photos.iterdir() if p.suffix),
    ):
        given = [name for name in given if name != "predictions.json"]
        assert main([*arguments, *given]) is None
        content = json.loads(Path(out, "predictions.json").read_text())
        assert [Path(i["file_name"]).name for i in content["images"]] == ["a.jpg"]
    cv2.imwrite("b.jpg", np.zeros((64, 96, 3), np.uint8))
    assert main([*arguments, "b.jpg"]) is None
    said = []
    assert len(find_images(["."], said.append)) == 2
    outside = out == "../elsewhere"
    assert said == ([] if outside else ["2 files left out, drawn by earlier predictions"])
    assert main([*arguments, "."]) is None  # also replaces what the run before the last drew
    content = json.loads(Path(out, "predictions.json").read_text())
    assert len(content["images"]) == 2
    with pytest.raises(UserError, match="drawings of earlier predictions do not count"):
        find_images([Path(out, "a.png")])


def test_what_is_done_is_kept_when_the_model_fails(box_run, tmp_path):
    folder, _, _ = box_run
    for name in ("a.png", "b.png", "c.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((64, 96, 3), np.uint8))
    detector = predictor_of_run(folder, 0.05)
    calls = iter([detector, detector])  # and then no more: StopIteration in a generator

    class Failing(Detector):
        def __init__(self):
            self.class_names = detector.class_names

        def __call__(self, image):
            return next(calls)(image)

    images = find_images([tmp_path])
    with pytest.raises(RuntimeError):
        list(predict(Failing(), images, tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["picture"] for image in content["images"]] == ["a.png", "b.png"]


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
    with pytest.raises(UserError, match="no image or video in"):
        find_images([tmp_path])
    with pytest.raises(UserError, match="no image, video or folder"):
        find_images([tmp_path / "missing"])


def test_weights_of_another_detector_are_refused(box_run):
    folder, cfg, _ = box_run
    other = cfg.clone()
    other.MODEL.ROI_HEADS.NUM_CLASSES = 5
    with pytest.raises(UserError, match="a different detector"):
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


def write_video(path, frames, rate=10.0):
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
    for frame in frames:
        writer.write(frame[:, :, ::-1].copy())
    writer.release()
    return path


def test_a_video_gives_a_drawn_video_and_one_entry_a_frame(box_run, tmp_path, capsys):
    folder, cfg, _ = box_run
    rng = np.random.default_rng(0)
    noise = cv2.resize(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8), (96, 64))
    frames = [np.roll(noise, 8 * k, axis=1) for k in range(5)]
    (tmp_path / "in").mkdir()
    video = write_video(tmp_path / "in" / "clip.mp4", frames)
    out = tmp_path / "out"
    given = [str(tmp_path / "in"), "-o", str(out), "--run", str(folder), "--threshold", "0.05"]
    assert main(given) is None
    assert "in 5 images and frames" in capsys.readouterr().out
    content = json.loads((out / "predictions.json").read_text())
    assert [image["frame"] for image in content["images"]] == [0, 1, 2, 3, 4]
    assert content["images"][3]["time"] == pytest.approx(0.3)
    assert content["images"][0]["picture"] == "clip.mp4"
    seen = next(read_frames(video)).astype(int)  # lossy, but RGB: not with two channels swapped
    assert np.abs(seen - frames[0]).mean() < 0.5 * np.abs(seen[:, :, ::-1] - frames[0]).mean()
    # Each frame's objects are those of the frame as an image.
    detector = build_predictor(cfg, folder / "model_final.pth", threshold=0.05)
    for number, frame in enumerate(read_frames(video)):
        boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == number + 1]
        expected = detector(frame).boxes
        expected[:, 2:] -= expected[:, :2]
        np.testing.assert_allclose(np.reshape(boxes, (-1, 4)), expected, atol=0.01)
    drawn = list(read_frames(out / "clip.mp4"))
    assert [frame.shape for frame in drawn] == [(64, 96, 3)] * 5
    assert np.abs(drawn[0] - seen).max() > 60  # boxes are on it
    with VideoFile(tmp_path / "copy.mp4", 10.0) as copy:
        copy.add(frames[0])
    again = next(read_frames(tmp_path / "copy.mp4")).astype(int)
    assert np.abs(again - frames[0]).mean() < 0.5 * np.abs(again[:, :, ::-1] - frames[0]).mean()
    assert sorted(p.name for p in out.iterdir()) == ["clip.mp4", "predictions.json"]


def test_a_video_that_breaks_off_is_named_and_its_frames_are_kept(box_run, tmp_path, monkeypatch):
    folder, _, _ = box_run
    video = write_video(tmp_path / "clip.mp4", [np.zeros((64, 96, 3), np.uint8)] * 4)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    monkeypatch.setattr("moco_det.inference.video.video_facts", lambda path: (10.0, 40))
    out = tmp_path / "out"
    given = [str(video), str(tmp_path / "broken.mp4"), "-o", str(out), "--run", str(folder)]
    assert main(given) == 1
    content = json.loads((out / "predictions.json").read_text())
    assert len(content["images"]) == 4
    assert "ends early, after 4 of 40 frames" in content["failed"][0]["error"]
    assert "not readable as a video" in content["failed"][1]["error"]
    assert sorted(p.name for p in out.iterdir()) == ["clip.mp4", "predictions.json"]


def test_a_run_that_is_not_finished_is_loaded_from_its_last_checkpoint(box_run, photo, tmp_path):
    folder, _, _ = box_run
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    (run / "model_0000099.pth").write_bytes((folder / "model_final.pth").read_bytes())
    (run / "last_checkpoint").write_text("model_0000099.pth\n")
    image = load_image(photo)
    found, expected = (predictor_of_run(path, 0.05)(image) for path in (run, folder))
    assert found.boxes.tolist() == expected.boxes.tolist()

"""A run that fails reports why: in one sentence where the user can act on it."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from moco_det.data.check_images import _has_end, why_unreadable
from moco_det.engine import trainer
from moco_det.engine.train_step import TrainStep
from tests.conftest import NARROW, QUICK
from tools.train_net import main


@pytest.fixture
def words(voc_dir, tmp_path):
    train = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval"]
    train += ["--output-dir", str(tmp_path / "run"), *NARROW, *QUICK]
    return [*train, "TEST.PRECISE_BN.ENABLED", "False"]


def raising(error):
    def step(*_):
        raise error

    return step


@pytest.mark.parametrize("error", [RuntimeError("a GPU fell off"), KeyboardInterrupt("twice")])
def test_what_goes_wrong_in_the_first_iteration_is_not_hidden(words, monkeypatch, error):
    monkeypatch.setattr(TrainStep, "__call__", raising(error))
    monkeypatch.setattr("tools.train_net.run_tool", lambda work, again: work())
    with pytest.raises(type(error), match=str(error)):
        main(words)


def test_a_broken_image_in_the_first_batch_is_named(words, voc_dir, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(voc_dir, data)
    for image in data.glob("JPEGImages/*.jpg"):
        image.write_bytes(image.read_bytes()[:900])
    words = [word.replace(str(voc_dir), str(data)) for word in words]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot read {data}/JPEGImages/00000")
    assert error.count("\n") == 1


def test_a_failed_iteration_has_no_progress_line(words, monkeypatch, capsys):
    step = TrainStep.__call__

    def fails_at_1(self, iteration):
        if iteration:
            raise RuntimeError("at 1")
        return step(self, iteration)

    monkeypatch.setattr(TrainStep, "__call__", fails_at_1)
    with pytest.raises(RuntimeError, match="at 1"):
        main(words)
    out = capsys.readouterr().out
    assert "iter 1/2" in out
    assert "iter 2/2" not in out


@pytest.mark.parametrize("protocol", ["VOC-random", "COCO-FPN-1x-random"])
def test_divergence_is_one_sentence_wherever_it_is_noticed(protocol, coco_spec, tmp_path, capsys):
    """At such a rate Detectron2's own checks of its boxes come before the loss's."""
    words = ["--config", protocol, "--train-data", coco_spec, "--output-dir", str(tmp_path / "run")]
    words += [*NARROW, *QUICK, "SOLVER.BASE_LR", "100", "SOLVER.WARMUP_ITERS", "0"]
    assert main([*words, "SOLVER.MAX_ITER", "20", "TEST.PRECISE_BN.ENABLED", "False"]) == 1
    error = capsys.readouterr().err
    assert "is not finite in iteration" in error
    assert "lower SOLVER.BASE_LR" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FloatingPointError("Predicted boxes or scores contain Inf/NaN."), "lower SOLVER.BASE_LR"),
        (AssertionError("Box tensor contains infinite or NaN!"), "lower SOLVER.BASE_LR"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "raise SOLVER.ACCUMULATION_STEPS"),
    ],
)
def test_what_the_model_raises_names_the_images_and_the_way_out(
    words, monkeypatch, capsys, error, sentence
):
    monkeypatch.setattr("moco_det.engine.train_step.forward_backward", raising(error))
    assert main(words) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert ".jpg" in said
    assert said.count("\n") == 1


def test_another_assertion_is_a_bug_and_keeps_its_traceback(words, monkeypatch):
    error = AssertionError("never")
    monkeypatch.setattr("moco_det.engine.train_step.forward_backward", raising(error))
    with pytest.raises(AssertionError, match="never"):
        main(words)


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.fixture
def data(voc_dir, tmp_path):
    """A copy to be damaged, with the words that train and test on it."""
    folder = tmp_path / "data"
    shutil.copytree(voc_dir, folder)
    words = ["--train-data", f"voc:{folder}:trainval", "--test-data", f"voc:{folder}:test"]
    words += ["--config", "VOC-random", "--output-dir", str(tmp_path / "run"), *NARROW, *QUICK]
    return folder, [*words, "SOLVER.MAX_ITER", "1", "TEST.PRECISE_BN.ENABLED", "False"]


def test_a_truncated_test_image_is_named_before_training(data, tmp_path, capsys):
    folder, words = data
    cut(folder / "JPEGImages/000005.jpg")
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: 1 image cannot be read: {folder}/JPEGImages/000005.jpg (image")
    assert not (tmp_path / "run").exists()


def test_all_images_are_decoded_on_request_and_every_broken_one_is_named(data, capsys):
    """Also where the damage lies in the middle and the file has its end."""
    folder, words = data
    for name in ("000001", "000002"):
        cut(folder / f"JPEGImages/{name}.jpg")
    middle = folder / "JPEGImages/000004.jpg"
    Image.open(middle).save(middle, "PNG")
    pixels = bytearray(middle.read_bytes())
    pixels[len(pixels) // 2] ^= 255
    middle.write_bytes(pixels)
    assert _has_end(middle)
    assert main([*words, "--check-images"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 3 images cannot be read: ")
    assert all(f"{name}.jpg (" in error for name in ("000001", "000002", "000004"))
    assert main([*words, "--preflight"]) == 1
    assert capsys.readouterr().err == error


def test_an_image_that_breaks_during_training_counts_as_found_nothing_in(
    data, tmp_path, capsys, monkeypatch
):
    folder, words = data
    step = TrainStep.__call__

    def breaking(self, iteration):
        (folder / "JPEGImages/000004.jpg").write_bytes(b"no image")
        return step(self, iteration)

    monkeypatch.setattr(TrainStep, "__call__", breaking)
    assert main([*words, "DATALOADER.NUM_WORKERS", "1"]) == 0
    sentence = "1 of 2 test images could not be read and count as images in which nothing was found"
    sentence += f": cannot read {folder}/JPEGImages/000004.jpg: "
    assert f"warning: {sentence}" in "".join(capsys.readouterr())
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert any(line.startswith(sentence) for line in results["explanation"])
    assert results["bbox"]["AP"] is not None


def test_an_image_with_other_bytes_after_its_end_is_accepted(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(path)
    assert _has_end(path)
    path.write_bytes(path.read_bytes() + b"\0" * 500)
    assert not _has_end(path)
    assert why_unreadable(path) == ""


def test_a_killed_loader_process_is_one_sentence(data, monkeypatch, capsys):
    folder, words = data
    monkeypatch.setattr(trainer, "build_train_mapper", lambda cfg: kill_itself)
    assert main([*words, "DATALOADER.NUM_WORKERS", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: A data-loading process was lost")
    assert error.count("\n") == 1


def kill_itself(record):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_an_output_directory_that_is_a_file_is_refused_before_anything_is_read(
    place, tmp_path, capsys
):
    file = tmp_path / "file"
    file.write_text("mine")
    chosen = file if place == "file" else file / "run"
    assert main(["--config", "VOC-random", "--output-dir", str(chosen)]) == 1
    assert f"{chosen} cannot be written ({file} is a file)" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_a_folder_without_permission_is_refused_and_evaluation_names_the_way(
    data, tmp_path, capsys, monkeypatch
):
    """Root may write everywhere, so that the system's answer is replaced."""
    _, words = data
    assert main(words) == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    capsys.readouterr()
    assert main(["--eval-only", "--output-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert f"no permission to write {tmp_path}/run" in error
    assert f"evaluate with --config {tmp_path}/run/config.yaml" in error


def test_a_damaged_last_checkpoint_is_passed_over(data, tmp_path, capsys):
    _, words = data
    run = tmp_path / "run"
    assert main(words) == 0
    results = (run / "results.json").read_text()
    for content in (b"\xff\xfe\x00\x80", b"", b"../../etc/passwd", b"\0" * 17):
        (run / "last_checkpoint").write_bytes(content)
        capsys.readouterr()
        assert main(["--eval-only", "--output-dir", str(run)]) == 0
        assert "model_final.pth" in capsys.readouterr().out
        assert json.loads(results)["bbox"] == json.loads((run / "results.json").read_text())["bbox"]
    assert main(["--resume", "--output-dir", str(run), "SOLVER.MAX_ITER", "2"]) == 0
    out, warned = capsys.readouterr()
    assert "last_checkpoint names no checkpoint" in warned
    assert "resumed    at iteration 1 of 2" in out


def test_precise_bn_over_more_images_than_there_are_is_logged(words, capsys):
    words = [*words, "TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "6"]
    assert main(words) == 0
    assert (
        "precise BN shows 6 batches of 2 images before each evaluation, each of the 4 training "
        "images 3 times" in capsys.readouterr().out
    )

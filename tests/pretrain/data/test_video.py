"""Frames of a video: which are taken, which are dropped, extracted once, and resumed exactly."""

import os
import shutil

import cv2
import numpy as np
import pytest

from moco_common.errors import UserError
from pretrain.checkpoint import format as checkpoint
from pretrain.data.sources import open_source
from pretrain.data.video import extract_frames
from tests.pretrain.runs import TINY, assert_equal_checkpoints, run, write_photographs

SIZE = (64, 48)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moco-det" / "video"


def picture(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, SIZE)


def write_video(path, pictures):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, SIZE)
    assert writer.isOpened()
    for image in pictures:
        writer.write(image)
    writer.release()
    return path


def decoded(source, index):
    return cv2.imdecode(np.frombuffer(source.read(index), np.uint8), cv2.IMREAD_COLOR)


def test_every_nth_frame_comes_in_the_order_of_the_video(tmp_path):
    pictures = [picture(seed) for seed in range(10)]
    video = write_video(tmp_path / "a.avi", pictures)
    source = open_source(f"video:{video}?every=3")
    assert [os.path.basename(source.name(i)) for i in range(len(source))] == [
        f"{number:09d}.jpg" for number in (0, 3, 6, 9)
    ]
    for index, number in enumerate((0, 3, 6, 9)):
        difference = np.abs(decoded(source, index).astype(int) - pictures[number]).mean()
        others = [np.abs(decoded(source, index).astype(int) - p).mean() for p in pictures]
        assert difference == min(others) < 12  # JPEG twice
    assert "4 frames used, one in 3, 0 near-duplicates dropped" in source.notes[0]


def test_near_duplicates_of_the_last_frame_kept_are_dropped_by_the_threshold(tmp_path):
    still, other = picture(0), picture(1)
    rng = np.random.default_rng(0)
    noisy = [cv2.add(still, rng.integers(0, 3, still.shape, dtype=np.uint8)) for _ in range(5)]
    video = write_video(tmp_path / "a.avi", [*noisy, other, other, still])
    names = extract_frames(f"{video}?every=1").names
    assert names == ["000000000.jpg", "000000005.jpg", "000000007.jpg"]
    assert len(extract_frames(f"{video}?every=1&threshold=0").names) == 8
    assert len(extract_frames(f"{video}?every=1&threshold=255").names) == 1


def test_frames_are_extracted_once_and_anew_for_another_video(tmp_path, cache):
    video = write_video(tmp_path / "a.avi", [picture(seed) for seed in range(4)])
    first = extract_frames(f"{video}?every=2")
    stamp = (first.folder / first.names[0]).stat().st_mtime_ns
    assert extract_frames(f"{video}?every=2") == first
    assert (first.folder / first.names[0]).stat().st_mtime_ns == stamp
    write_video(video, [picture(seed) for seed in range(9)])
    second = extract_frames(f"{video}?every=2")
    assert second.folder != first.folder
    assert len(second.names) == 5
    assert not list(cache.glob("*.part-*"))


def test_an_extraction_that_fails_leaves_nothing(tmp_path, cache):
    for content in (b"", b"not a video at all"):
        (tmp_path / "a.mp4").write_bytes(content)
        with pytest.raises(UserError, match="reads no frame from .*a.mp4"):
            open_source(f"video:{tmp_path / 'a.mp4'}")
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?every=0", "needs a whole number `every` of at least 1"),
        ("?every=x", "needs a whole number `every` of at least 1"),
        ("?every=1&threshold=300", "a `threshold` from 0 to 255"),
        ("?fps=2", "unknown setting fps: write video:FILE"),
        (".absent", "is not a file; write video:FILE"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(tmp_path, query, message):
    video = write_video(tmp_path / "a.avi", [picture(0)])
    with pytest.raises(UserError, match=message):
        open_source(f"video:{video}{query}")


def test_a_run_on_a_video_and_photographs_is_resumed_bit_for_bit(tmp_path):
    video = write_video(tmp_path / "a.avi", [picture(seed) for seed in range(12)])
    photographs = write_photographs(tmp_path / "photographs", count=4)
    words = ["--data", f"video:{video}?every=1", photographs, *TINY]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, text = run("--output-dir", whole, *words)
    assert code == 0, text
    assert "16 images" in text
    assert "12 frames used, one in 1, 0 near-duplicates dropped" in text
    broken.mkdir()
    shutil.copy(whole / "checkpoint_00000003.pth", broken / checkpoint.LAST)
    code, text = run("--output-dir", broken, "--resume", *words)
    assert code == 0, text
    assert_equal_checkpoints(whole / checkpoint.LAST, broken / checkpoint.LAST)

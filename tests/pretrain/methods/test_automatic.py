"""What ``auto`` means: the queue follows the data, BN groups the batch, workers the machine."""

import json
import shutil

import pytest
import yaml

from moco_common.errors import UserError
from pretrain.checkpoint import format as checkpoint
from pretrain.config.defaults import load_config
from pretrain.methods import automatic
from pretrain.methods.automatic import AUTO, bn_groups, num_workers, queue_size, resolve
from tests.pretrain.runs import TINY, run, write_photographs

QUEUE = TINY.index("MOCO.QUEUE_SIZE")
TINY_AUTO = [*TINY[:QUEUE], *TINY[QUEUE + 2 :]]  # without MOCO.QUEUE_SIZE


def test_the_queue_is_the_papers_on_imagenet_and_never_longer_than_half_the_images():
    sizes = {images: queue_size(images) for images in range(1, 3000)}
    sizes |= {images: queue_size(images) for images in (10**4, 10**5, 262_144, 1_281_167)}
    assert sizes[1_281_167] == sizes[262_144] == 65536
    assert sizes[10**5] == 25_000
    assert sizes[2048] == sizes[1024] == 512
    assert sizes[13] == 6
    assert all(size <= images / 2 for images, size in sizes.items() if images > 1)
    ordered = [sizes[images] for images in sorted(sizes)]
    assert all(a <= b or a <= 8 for a, b in zip(ordered, ordered[1:], strict=False))
    assert sizes[1] == 1


def test_bn_groups_are_the_papers_and_workers_share_the_cores(monkeypatch):
    assert (bn_groups(256), bn_groups(64), bn_groups(16)) == (8, 2, 1)
    monkeypatch.setattr(automatic, "cpu_count", lambda: 12)
    assert [num_workers(ranks) for ranks in (1, 2, 8, 64)] == [12, 6, 1, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of 64 ranks
    assert num_workers(64) == 3


def test_numbers_stay_and_auto_is_resolved_once_for_a_run():
    words = "MODEL.BN_GROUPS auto DATALOADER.NUM_WORKERS auto SOLVER.BATCH_SIZE 128".split()
    cfg = load_config("moco-v2", words)
    assert cfg.MOCO.QUEUE_SIZE == cfg.MODEL.BN_GROUPS == cfg.DATALOADER.NUM_WORKERS == AUTO
    resolved = resolve(cfg, images=8000)
    assert (resolved.MOCO.QUEUE_SIZE, resolved.MODEL.BN_GROUPS) == (2000, 4)
    assert resolved.DATALOADER.NUM_WORKERS >= 1
    assert resolve(resolved, images=99) == resolved
    grown = resolve(cfg, images=99, recorded={"MOCO.QUEUE_SIZE": 2000})
    assert grown.MOCO.QUEUE_SIZE == 2000
    assert cfg.MOCO.QUEUE_SIZE == AUTO  # which is not changed in place


@pytest.mark.parametrize("value", ["many", "0.5", "[1]"])
def test_another_value_than_a_number_or_auto_is_refused(value):
    with pytest.raises(UserError, match=r"MOCO\.QUEUE_SIZE to .*: it takes a whole number or auto"):
        load_config("moco-v2", ["MOCO.QUEUE_SIZE", value])


def test_a_short_queue_is_logged_with_the_reason_recorded_and_kept_by_a_resumed_run(tmp_path):
    photographs, out = write_photographs(tmp_path / "photographs"), tmp_path / "run"
    words = ["--data", photographs, "--output-dir", out, *TINY_AUTO]
    code, text = run(*words)
    assert code == 0, text
    assert "MOCO.QUEUE_SIZE auto is 6 for 13 images: the 65536 keys of the papers" in text
    assert yaml.safe_load((out / "config.yaml").read_text())["MOCO"]["QUEUE_SIZE"] == 6
    state = checkpoint.load(out / checkpoint.LAST)
    assert len(state["state_dict"]["queue"]) == 6
    assert yaml.safe_load(state["config"])["MOCO"]["QUEUE_SIZE"] == 6
    shutil.copy(photographs / "0.jpg", photographs / "more.jpg")
    for extra in range(9):
        shutil.copy(photographs / "0.jpg", photographs / f"more{extra}.jpg")
    code, text = run(*words, "--resume", "SOLVER.MAX_ITER", 8)
    assert code == 0, text
    assert json.loads((out / "metrics.json").read_text().splitlines()[-1])["iteration"] == 8
    assert len(checkpoint.load(out / checkpoint.LAST)["state_dict"]["queue"]) == 6


def test_an_explicit_queue_is_respected_with_a_warning(tmp_path):
    photographs = write_photographs(tmp_path / "photographs")
    code, text = run("--data", photographs, "--output-dir", tmp_path / "run", *TINY)
    assert code == 0, text
    assert "warning: MOCO.QUEUE_SIZE is 20, more than half of the 13 images" in text
    assert len(checkpoint.load(tmp_path / "run" / checkpoint.LAST)["state_dict"]["queue"]) == 20

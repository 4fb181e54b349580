"""The preflight says what fits, tries the worst there is, and leaves no trace."""

import copy
import mmap
import random
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.structures import BoxMode

from moco_det.config.protocols import load_config
from moco_det.data.register import register
from moco_det.data.samplers import TrainingSet, load_training_set
from moco_det.engine import memory_preflight as module
from moco_det.engine.memory_preflight import CPUMemory, Report, preflight
from moco_det.modeling.detector import build_detector
from tests.conftest import NARROW, QUICK
from tools.train_net import main

MB = 1e6


def report(images, line, limit, batch=16, world_size=1):
    needed = {n: line(n) for n in range(1, batch // world_size + 1)}
    return Report((1333, 800), 93, images, needed, limit, batch, world_size)


def test_what_does_not_fit_comes_with_what_does():
    def line(n):
        return (500 + 1000 * n) * MB

    tight = report(16, line, 10_000 * MB)
    assert not tight.fits
    assert tight.passes == 2  # 8 images: 8.5 GB of 9.5
    assert str(tight) == (
        "the worst pass (16 images of 1333x800 pixels with 93 objects each) needs 16.5 GB of "
        "10.0 GB; SOLVER.ACCUMULATION_STEPS 2 fits, with SOLVER.IMS_PER_BATCH 16 unchanged"
    )
    assert report(2, line, 20_000 * MB).fits
    assert "ACCUMULATION_STEPS 1 fits as well" in str(report(2, line, 20_000 * MB))
    assert str(report(16, line, 20_000 * MB)).endswith("GB: fits")
    assert report(4, line, 2_700 * MB, world_size=4).passes == 2
    none = report(16, line, 1_000 * MB)
    assert none.passes is None
    assert "not even one image per pass fits" in str(none)


def config(spec, *overrides):
    cfg = load_config("COCO-C4-1x-random", [*NARROW, *QUICK, *overrides])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.INPUT.MAX_SIZE_TRAIN = 100
    cfg.DATASETS.TRAIN = (register(spec, None),)
    return cfg


def everything(model):
    """All that a preflight could disturb."""
    return copy.deepcopy(
        {
            "state": model.state_dict(),
            "gradients": [None if p.grad is None else p.grad for p in model.parameters()],
            "modes": [m.training for m in model.modules()],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
        }
    )


def test_it_leaves_no_trace(coco_spec):
    cfg = config(coco_spec)
    model = build_detector(cfg)
    model.backbone.stem.eval()
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    before, gradient = everything(model), weight.grad
    found = preflight(cfg, model)
    after = everything(model)
    assert found.images == 2
    assert found.objects == 1
    assert 0 < found.needed[1] < found.limit
    assert weight.grad is gradient
    for key in ("modes", "numpy", "python"):
        assert before[key] == after[key]
    assert torch.equal(before["torch"], after["torch"])
    assert all(torch.equal(v, after["state"][k]) for k, v in before["state"].items())
    for a, b in zip(before["gradients"], after["gradients"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_worst_batch_is_the_largest_canvas_with_the_most_objects(coco_spec, monkeypatch):
    cfg = config(coco_spec, "SOLVER.IMS_PER_BATCH", "3", "INPUT.MIN_SIZE_TRAIN", "(32,48)")
    records = list(load_training_set(cfg).images)
    box = {"bbox": [5, 5, 60, 60], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    box["segmentation"] = [[5, 5, 60, 5, 60, 60]]
    records[2] = {**records[2], "annotations": [box] * 7}
    # Scaled to a short side of 48 and a long one of at most 100: 20x100, 58x48, 48x58, 48x60.
    sizes = np.array([(100, 500), (96, 80), (80, 96), (80, 100)])
    training_set = TrainingSet(records, sizes, np.array([1, 1, 7, 1]))
    seen = []

    def pass_of(model, batch, dtype):
        seen.append([(tuple(i["image"].shape), len(i["instances"])) for i in batch])

    monkeypatch.setattr(module, "forward_backward", pass_of)
    found = preflight(cfg, torch.nn.Linear(1, 1), training_set)
    # As large as the tall ones, which are batched apart, and lying as its image does.
    assert found.size == (100, 48)
    assert seen == [[((3, 48, 100), 7)] * n for n in (1, 2, 3)]


def test_memory_is_a_line_through_what_was_measured():
    line = module._line({1: 30.0, 2: 50.0}, start=10.0)
    assert [line(n) for n in (1, 2, 5)] == [30, 50, 110]
    assert module._line({1: 30.0}, start=10.0)(3) == 70
    assert module._line({1: 30.0, 2: float("inf")}, start=10.0)(3) == 70
    assert module._line({1: float("inf")}, start=10.0)(3) == float("inf")


def test_the_peak_of_a_process_is_measured_not_its_past():
    """Pages mapped straight from the system: what is freed to the heap may stay resident."""
    memory = CPUMemory()
    with touched_pages(60 * MB):
        pass
    memory.reset()
    before = memory.peak()
    with touched_pages(30 * MB):
        pass
    assert 20 * MB < memory.peak() - before < 50 * MB
    assert memory.limit() > memory.peak()


@contextmanager
def touched_pages(size):
    with mmap.mmap(-1, int(size)) as pages:
        for page in range(0, int(size), mmap.PAGESIZE):
            pages[page] = 1
        yield


def test_only_the_preflight_and_one_that_does_not_fit(voc_dir, tmp_path, capsys, monkeypatch):
    args = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval", *NARROW, *QUICK]
    args += ["--output-dir", str(tmp_path / "run"), "PREFLIGHT", "only"]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "the worst pass (2 images of 77x64 pixels with 1 object each) needs" in said
    assert "iter 1/2" not in said
    monkeypatch.setattr(CPUMemory, "limit", lambda self: 1e6)
    assert main(args) == 1
    assert "error: the worst pass" in capsys.readouterr().err

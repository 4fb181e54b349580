"""Supervised pre-training: the loss, the classes of the folders, and what labels touch."""

import copy
import json
import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from moco_common.errors import UserError
from pretrain.checkpoint import format as checkpoint
from pretrain.data.sources import open_source
from pretrain.engine.train_loop import train
from pretrain.inspection.run_directory import open_run
from pretrain.methods.supervised import Supervised
from tests.pretrain import tiny


def test_loss_and_gradients_are_those_of_the_cross_entropy_of_each_image():
    method, _ = tiny.build("supervised")
    encoder = copy.deepcopy(method.encoder_q)
    views, index = tiny.views("supervised", 1), tiny.index(1)
    outputs = method(views, 0, index)
    logits = encoder(views[0])
    assert logits.shape == (tiny.BATCH, tiny.CLASSES)
    loss, right = 0.0, 0
    for row, image in zip(logits, index.tolist(), strict=True):
        label = image % tiny.CLASSES
        loss = loss - torch.log(torch.exp(row[label]) / torch.exp(row).sum()) / tiny.BATCH
        right += int(row.argmax()) == label
    torch.testing.assert_close(outputs["loss"], loss)
    assert outputs["top1"].item() == pytest.approx(right / tiny.BATCH)
    torch.testing.assert_close(
        torch.autograd.grad(outputs["loss"], list(method.encoder_q.parameters())),
        torch.autograd.grad(loss, list(encoder.parameters())),
        rtol=1e-6,
        atol=1e-9,
    )
    assert method.chance_loss == pytest.approx(math.log(tiny.CLASSES))
    uniform = F.cross_entropy(torch.ones(4, tiny.CLASSES), torch.arange(4))
    assert method.chance_loss == pytest.approx(uniform.item())


def folder_of(root, *classes, images=4):
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            picture = rng.integers(0, 90, (40, 40, 3), dtype=np.uint8)
            picture[:, :, number % 3] += 150
            cv2.imwrite(str(root / name / f"{i}.png"), picture)
    return root


def test_classes_are_counted_recorded_and_needed_by_no_inspection(tmp_path):
    data = folder_of(tmp_path / "photos", "a", "b", "c")
    train(tiny.recipe("supervised", data, tmp_path / "run", "SOLVER.MAX_ITER", "2"), quiet=True)
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert recorded["SUPERVISED"]["CLASSES"] == 3
    state = checkpoint.load(tmp_path / "run" / checkpoint.LAST)["state_dict"]
    assert state["encoder_q.fc.weight"].shape[0] == 3
    assert "labels" not in state
    assert open_run(tmp_path / "run").build().chance_loss == pytest.approx(math.log(3))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").open()]
    assert all(0 <= line["top1"] <= 1 for line in lines)
    folder_of(data, "d")
    cfg = tiny.recipe("supervised", data, tmp_path / "run", "SOLVER.MAX_ITER", "4")
    with pytest.raises(UserError, match="SUPERVISED.CLASSES was 3 and is now 4"):
        train(cfg, resume=True, quiet=True)


@pytest.mark.parametrize(
    ("classes", "overrides", "message"),
    [
        ((".",), (), r"needs the class of every image, but .*0\.png is in no class folder"),
        (("a",), (), "--data has 1 class folders, but METHOD supervised needs two or more"),
        (("a", "b"), ("SUPERVISED.CLASSES", 5), "--data has 2 class folders.*CLASSES is 5"),
        (("train", "val"), (), "train, val, which look like splits"),
    ],
)
def test_data_without_two_classes_are_refused(tmp_path, classes, overrides, message):
    data = tmp_path / "photos"
    if classes == (".",):
        folder_of(tmp_path, "photos")
    else:
        folder_of(data, *classes)
    cfg = tiny.config("supervised", "SUPERVISED.CLASSES", 0)
    cfg.merge_from_list(list(overrides))
    with pytest.raises(UserError, match=message):
        Supervised.complete(cfg, open_source(str(data)))


def test_no_other_method_sees_the_class_folders(tmp_path):
    """MoCo's run on photographs in class folders is its run on the same ones in one folder."""
    ends = []
    for name in ("sorted", "flat"):
        data = tmp_path / name
        for number in range(9):
            place = data / f"class {number // 3}" if name == "sorted" else data
            place.mkdir(parents=True, exist_ok=True)
            picture = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            cv2.imwrite(str(place / f"{number}.png"), picture)
        cfg = tiny.recipe("moco-v2", data, tmp_path / f"run-{name}", "SOLVER.MAX_ITER", "2")
        train(cfg, quiet=True)
        ends.append(checkpoint.load(tmp_path / f"run-{name}" / checkpoint.LAST)["state_dict"])
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())

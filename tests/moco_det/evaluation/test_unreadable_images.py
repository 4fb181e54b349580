"""Test images that cannot be read: what an evaluation makes of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moco_common.errors import UserError
from moco_det.evaluation.sem_seg_evaluation import confusion, scores
from moco_det.evaluation.unreadable_images import (
    REASON,
    LeavingOutUnreadable,
    left_out,
    map_or_leave_out,
)


class Echo(nn.Module):
    def forward(self, inputs):
        return [{"instances": example["image"]} for example in inputs]


def test_outputs_stay_with_their_inputs():
    model = LeavingOutUnreadable(Echo().eval(), semantic=False)
    assert not model.training
    facts = {"file_name": "b.jpg", "height": 4, "width": 6, REASON: "cannot read b.jpg: cut"}
    inputs = [{"image": 1}, facts, {"image": 3}]
    first, second, third = model(inputs)
    assert (first["instances"], third["instances"]) == (1, 3)
    assert len(second["instances"]) == 0
    assert second["instances"].image_size == (4, 6)
    assert second["instances"].pred_masks.shape == (0, 4, 6)
    assert model.reasons == {"b.jpg": "cannot read b.jpg: cut"}
    assert model([facts])[0]["instances"].scores.shape == (0,)


def test_a_broken_image_becomes_a_reason_and_a_bug_stays_one(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    record = {"file_name": str(path), "image_id": 7, "height": 64, "width": 64, "annotations": [1]}

    def mapper(record):
        Image.open(record["file_name"]).load()
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        map_or_leave_out(mapper, record)
    path.write_bytes(path.read_bytes()[:500])
    found = map_or_leave_out(mapper, record)
    assert found[REASON].startswith(f"cannot read {path}: ")
    assert found["image_id"] == 7
    assert "annotations" not in found


def test_the_sentence_counts_names_and_gives_up_where_nothing_is_left():
    assert left_out({}, 9) == ""
    reasons = {f"{n}.jpg": f"cannot read {n}.jpg: cut" for n in range(7)}
    sentence = left_out(reasons, 9)
    assert sentence.startswith("7 of 9 test images could not be read")
    assert sentence.endswith("cannot read 4.jpg: cut; ...")
    with pytest.raises(UserError, match="no test image can be read"):
        left_out(reasons, 7)


def test_no_pixel_of_an_unreadable_image_is_right():
    labels = np.array([[0, 0, 1, 255]])
    read = confusion(labels, np.array([[0, 0, 1, 1]]), 2, 255)
    nothing = confusion(labels, np.full((1, 4), 2), 2, 255)
    found = scores(read + nothing, ["a", "b"])
    # By hand: of 4 and 2 annotated pixels half are right, and no other pixel is predicted.
    assert (found["IoU-a"], found["IoU-b"], found["pACC"]) == (50.0, 50.0, 50.0)
    assert scores(read, ["a", "b"])["mIoU"] == 100.0
    model = LeavingOutUnreadable(Echo(), semantic=True)
    assert model([{"file_name": "b.jpg", REASON: "cut"}]) == [{"sem_seg": None}]
    assert torch.is_grad_enabled()

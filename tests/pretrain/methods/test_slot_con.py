"""SlotCon against the formulas of its paper written as loops, and against RoIAlign."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from moco_common.errors import UserError
from pretrain.methods.correspondence import overlap, resample
from pretrain.methods.slot_con import NormOfValid, present
from tests.pretrain import tiny

STUDENT, TEACHER, SLOT = 0.1, 0.07, 0.2


def region_by_hand(place, other):
    left, top = max(place[0], other[0]), max(place[1], other[1])
    return left, top, min(place[2], other[2]), min(place[3], other[3])


def aligned(maps, places, others):
    """The paper's inverse augmentation by image: RoIAlign of the shared region, unflipped."""
    parts = []
    for x, place, other in zip(maps, places.tolist(), others.tolist(), strict=True):
        left, top, right, bottom, flip = place
        first_x, first_y, last_x, last_y = region_by_hand(place, other)
        height, width = x.shape[1:]
        box = [
            (first_x - left) / (right - left) * width,
            (first_y - top) / (bottom - top) * height,
            (last_x - left) / (right - left) * width,
            (last_y - top) / (bottom - top) * height,
        ]
        if flip:
            box[0], box[2] = width - box[2], width - box[0]
        boxes = [torch.tensor([box], dtype=x.dtype)]
        part = roi_align(x[None], boxes, (height, width), sampling_ratio=1, aligned=True)
        parts.append(part.flip(3) if flip else part)
    return torch.cat(parts)


def test_maps_are_resampled_as_by_roi_align():
    first, second = tiny.places("slot-con", 0)
    maps = torch.randn(tiny.BATCH, 5, 4, 6, generator=torch.Generator().manual_seed(1)).double()
    region, valid = overlap(first, second)
    assert valid.all()
    torch.testing.assert_close(
        resample(maps, first, region), aligned(maps, first, second), rtol=1e-6, atol=1e-6
    )


def test_views_that_do_not_overlap_are_found():
    place = torch.tensor([[0.0, 0.0, 0.4, 0.5, 0.0], [0.0, 0.0, 0.4, 0.5, 0.0]])
    other = torch.tensor([[0.3, 0.1, 0.9, 0.9, 1.0], [0.5, 0.1, 0.9, 0.9, 1.0]])
    region, valid = overlap(place, other)
    assert valid.tolist() == [True, False]
    assert region[0].tolist() == pytest.approx(
        region_by_hand(*place[:1].tolist(), *other[:1].tolist())
    )


def slot_of(z, scores, n, k):
    """Eq. 5: the mean of an image's cells, weighted by the attention of slot k."""
    total = weight = 0.0
    for i in range(2):
        for j in range(2):
            a = torch.exp(scores[n, k, i, j] / TEACHER)
            a = a / torch.exp(scores[n, :, i, j] / TEACHER).sum() + 1e-6
            total, weight = total + a * z[n, :, i, j], weight + a
    return total / weight


def found(scores, n):
    return {int(scores[n, :, i, j].argmax()) for i in range(2) for j in range(2)}


def predicted(predictor, rows):
    """The predictor by torch's own layers, on the rows that count."""
    x = torch.stack(rows)
    for linear, norm in zip(predictor.linear[:2], predictor.norm, strict=True):
        x = F.gelu(F.batch_norm(linear(x), None, None, norm.weight, norm.bias, training=True))
    return F.normalize(predictor.linear[2](x), dim=1)


def naive(method, views, places, centre):
    student, teacher = ([net(view) for view in views] for net in (method.encoder_q, method.target))
    total = 0.0
    for one, other in ((0, 1), (1, 0)):
        ours = aligned(student[one][1], places[one], places[other])
        wanted = aligned(teacher[other][1].detach(), places[other], places[one])
        group = 0.0
        for n in range(tiny.BATCH):
            for i in range(2):
                for j in range(2):
                    q = torch.softmax((wanted[n, :, i, j] - centre) / TEACHER, 0)
                    p = torch.softmax(ours[n, :, i, j] / STUDENT, 0)
                    group = group - (q * torch.log(p)).sum() / (4 * tiny.BATCH)
        (z, scores), (y, teachers) = student[one], (x.detach() for x in teacher[other])
        keys = {
            (n, k): F.normalize(slot_of(y, teachers, n, k), dim=0)
            for n in range(tiny.BATCH)
            for k in sorted(found(teachers, n))
        }
        both = [(n, k) for n, k in keys if k in found(scores, n)]
        queries = predicted(method.predictor, [slot_of(z, scores, n, k) for n, k in both])
        contrast = 0.0
        for place, query in zip(both, queries, strict=True):
            exponentials = {where: torch.exp(query @ key / SLOT) for where, key in keys.items()}
            part = exponentials[place] / sum(exponentials.values())
            contrast = contrast - 2 * SLOT * torch.log(part) / len(both)
        total = total + 0.3 * group + 0.7 * contrast
    return total, torch.stack([scores for _, scores in teacher])


@pytest.mark.parametrize("slots", [3, 6])  # fewer and more than the four cells of a map
def test_two_steps_are_those_of_the_formulas_cell_by_cell(slots):
    method, _ = tiny.build("slot-con", "SLOTCON.GROUP_WEIGHT", 0.3, "SLOTCON.SLOTS", slots)
    with torch.no_grad():
        for p in method.target.parameters():
            p.mul_(1.1)
    centre = torch.zeros(slots).double()
    trained = [p for p in method.parameters() if p.requires_grad]
    for step in range(2):
        views, places = tiny.views("slot-con", step), tiny.places("slot-con", step)
        copied = copy.deepcopy(method)
        outputs = method(views, step, tiny.index(step), places)
        expected, scores = naive(copied, views, places, centre)
        torch.testing.assert_close(outputs["loss"], expected, rtol=1e-6, atol=1e-8)
        gradients = torch.autograd.grad(
            expected, [p for p in copied.parameters() if p.requires_grad]
        )
        torch.testing.assert_close(
            torch.autograd.grad(outputs["loss"], trained), gradients, rtol=1e-5, atol=1e-8
        )
        centre = 0.9 * centre + 0.1 * scores.mean((0, 1, 3, 4)).detach()
        torch.testing.assert_close(method.centre, centre)


def test_without_overlap_only_the_slots_are_contrasted():
    method, _ = tiny.build("slot-con")
    views, places = tiny.views("slot-con", 0), tiny.places("slot-con", 0)
    places[0, :, :4] = torch.tensor([0.0, 0.0, 0.2, 0.2])
    places[1, :, :4] = torch.tensor([0.8, 0.8, 1.0, 1.0])
    outputs = method(views, 0, tiny.index(0), places)
    assert outputs["overlap"].item() == 0
    outputs["loss"].backward()
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)


def test_slots_that_no_cell_chooses_are_absent():
    scores = torch.tensor([[[[0.9, 0.1]], [[0.2, 0.3]], [[0.1, 0.2]]]])  # one image, 1x2 cells
    assert present(scores).tolist() == [[True, True, False]]


def test_rows_that_do_not_count_leave_the_statistics_alone():
    norm = NormOfValid(4).double()
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid = torch.tensor([True, False, True, True, False, True, True])
    y = norm(x, valid)
    expected = F.batch_norm(x[valid], None, None, training=True)
    torch.testing.assert_close(y[valid], expected)
    x[1] = 1e6
    torch.testing.assert_close(norm(x, valid)[valid], expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SLOTS", 1, "SLOTCON.SLOTS is 1: it must be at least 2"),
        ("GROUP_WEIGHT", 1.5, r"SLOTCON.GROUP_WEIGHT is 1.5: it must lie in \[0, 1\]"),
        ("SLOT_TEMPERATURE", 0.0, "SLOTCON.SLOT_TEMPERATURE is 0.0: it must be above 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        tiny.build("slot-con", f"SLOTCON.{key}", value)

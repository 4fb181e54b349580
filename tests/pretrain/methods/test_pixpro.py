"""PixPro against the formulas of its paper written as loops."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from moco_common.errors import UserError
from pretrain.methods.correspondence import nearby
from tests.pretrain import tiny


def centre(place, i, j, rows, columns):
    """Of the cell in row i and column j, by hand; a flipped view runs from right to left."""
    left, top, right, bottom, flip = place.tolist()
    x = (j + 0.5) / columns
    return (
        left + (1 - x if flip else x) * (right - left),
        top + (i + 0.5) / rows * (bottom - top),
    )


def pairs_by_hand(place, other, rows, columns, threshold):
    diagonals = [
        math.hypot((right - left) / columns, (bottom - top) / rows)
        for left, top, right, bottom, _ in (place.tolist(), other.tolist())
    ]
    grid = [(i, j) for i in range(rows) for j in range(columns)]
    return torch.tensor(
        [
            [
                math.dist(centre(place, *a, rows, columns), centre(other, *b, rows, columns))
                < threshold * max(diagonals)
                for b in grid
            ]
            for a in grid
        ]
    )


def test_pairs_are_those_of_the_distances_by_hand():
    first, second = tiny.places("pixpro", 0)
    found = nearby(first, second, 3, 4, 0.7)
    expected = torch.stack(
        [pairs_by_hand(*both, 3, 4, 0.7) for both in zip(first, second, strict=True)]
    )
    assert torch.equal(found, expected)
    assert 0.05 < found.float().mean() < 0.5


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0)


def propagation(x, transform):
    """Eq. 2 and 3 for the cells of one image, with one linear layer as g."""
    g = [transform.weight[:, :, 0, 0] @ cell + transform.bias for cell in x]
    return [
        sum(max(cosine(a, b), a.new_zeros(())) ** 2 * value for b, value in zip(x, g, strict=True))
        for a in x
    ]


def naive(method, views, places):
    """Loss over all pairs of cells, in both directions, and the instance branch."""
    online, target = ([net(view) for view in views] for net in (method.encoder_q, method.target))
    total = 0.0
    for n in range(tiny.BATCH):
        x = [[dense[n, :, i, j] for i in range(2) for j in range(2)] for _, dense, _ in online]
        fixed = [
            [dense[n, :, i, j].detach() for i in range(2) for j in range(2)]
            for _, dense, _ in target
        ]
        for one, other in ((0, 1), (1, 0)):
            y = propagation(x[one], method.transform)
            positive = pairs_by_hand(places[one, n], places[other, n], 2, 2, 0.7)
            losses = [
                2 - 2 * cosine(y[a], fixed[other][b])
                for a in range(4)
                for b in range(4)
                if positive[a, b]
            ]
            total = total + sum(losses) / max(1, len(losses)) / tiny.BATCH
            p = method.predictor(online[one][0])[n]
            instance = 2 - 2 * cosine(p, target[other][0][n].detach())
            total = total + 0.5 * instance / tiny.BATCH
    return total


def test_loss_and_gradients_are_those_of_the_formulas_cell_by_cell():
    method, _ = tiny.build("pixpro")
    with torch.no_grad():
        for p in method.target.parameters():
            p.mul_(1.1)
    views, places = tiny.views("pixpro", 0), tiny.places("pixpro", 0)
    outputs = method(views, 0, tiny.index(0), places)
    expected = naive(method, views, places)
    torch.testing.assert_close(outputs["loss"], expected)
    trained = [p for p in method.parameters() if p.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(outputs["loss"], trained),
        torch.autograd.grad(expected, trained),
        rtol=1e-6,
        atol=1e-9,
    )


def test_an_image_whose_views_do_not_overlap_counts_as_nothing():
    method, _ = tiny.build("pixpro", "PIXPRO.INSTANCE_WEIGHT", 0.0)
    assert method.predictor is None
    views, places = tiny.views("pixpro", 0), tiny.places("pixpro", 0)
    places[0, :, :4] = torch.tensor([0.0, 0.0, 0.2, 0.2])
    places[1, :, :4] = torch.tensor([0.8, 0.8, 1.0, 1.0])
    outputs = method(views, 0, tiny.index(0), places)
    assert outputs["loss"].item() == outputs["overlap"].item() == 0
    outputs["loss"].backward()
    assert all(not p.grad.any() for p in method.parameters() if p.grad is not None)


def test_the_target_follows_the_network_along_half_a_cosine():
    method, _ = tiny.build("pixpro", "PIXPRO.MOMENTUM", 0.9)
    old = copy.deepcopy(method.target)
    with torch.no_grad():
        for p in method.encoder_q.parameters():
            p.add_(1)
    method.after_update(1, 3)
    tau = 1 - 0.1 * (math.cos(math.pi / 3) + 1) / 2
    for p, before, online in zip(
        method.target.parameters(), old.parameters(), method.encoder_q.parameters(), strict=True
    ):
        torch.testing.assert_close(p, tau * before + (1 - tau) * online)


@pytest.mark.parametrize(("key", "value"), [("THRESHOLD", 0.0), ("SHARPNESS", 0.5)])
def test_settings_without_a_meaning_are_refused(key, value):
    with pytest.raises(UserError, match="they must be above 0, at least 1 and at least 0"):
        tiny.build("pixpro", f"PIXPRO.{key}", value)

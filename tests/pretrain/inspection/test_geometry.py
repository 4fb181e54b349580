"""The figures of `pretrain.inspection` against closed forms and naive loops."""

import math

import numpy as np
import pytest
import torch

from pretrain.inspection.curves import draw_curves, last_words
from pretrain.inspection.dictionary import judge_prototypes, prototype_use
from pretrain.inspection.filters import INITIAL_NORM, draw_filters, growth, measure_filters
from pretrain.inspection.geometry import judge, measure
from pretrain.inspection.neighbours import nearest_neighbours
from pretrain.modeling.resnet import ResNet
from pretrain.probe.features import Features


def random_units(n, d, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def test_a_sphere_filled_evenly_has_no_mean_cosine_and_full_rank():
    found = measure(random_units(20_000, 32))
    assert abs(found.mean_cosine) < 3 / math.sqrt(32 * 20_000)  # three standard errors, and more
    assert 31.9 < found.effective_rank <= 32
    assert found.std_ratio == pytest.approx(1, abs=0.01)
    assert found.dead_dimensions == 0
    assert judge(found, "keys")[0] == "healthy"


def test_vectors_that_are_all_one_have_rank_one_and_cosine_one():
    found = measure(torch.tensor([[3.0, 0, 4, 0]]).expand(50, 4))
    assert found.norms == (5, 5, 5)
    assert found.mean_cosine == pytest.approx(1)
    assert found.effective_rank == pytest.approx(1)
    assert found.std_ratio == 0
    assert found.dead_dimensions == 4
    assert judge(found, "keys")[0] == "collapsed"


@pytest.mark.parametrize("r", [1, 3, 16])
def test_r_orthogonal_directions_taken_equally_often_have_rank_r(r):
    found = measure(torch.eye(16)[torch.arange(48) % r] * 7)
    assert found.effective_rank == pytest.approx(r)
    same, pairs = 48 // r - 1, 47  # of each vector's pairs those of its own direction
    assert found.mean_cosine == pytest.approx(same / pairs)
    assert found.norms == (7, 7, 7)
    assert found.dead_dimensions == 16 - (r if r > 1 else 0)


def test_two_opposite_points_are_no_collapse_to_one_but_one_dimension():
    axis = random_units(1, 64)
    signs = torch.tensor([1.0, -1.0]).repeat(100)[:, None]
    found = measure(axis * signs)
    assert abs(found.mean_cosine) < 0.01
    assert found.effective_rank == pytest.approx(1)
    assert judge(found, "keys")[0] == "few dimensions"


def test_vectors_round_one_direction_are_bunched():
    x = random_units(500, 32) + 2 * random_units(1, 32, seed=1)
    assert judge(measure(x), "keys")[0] == "bunched"


def test_the_figures_are_those_of_naive_loops():
    x = random_units(40, 7) + 0.3
    found = measure(3 * x)
    unit = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    pairs = [unit[i] @ unit[j] for i in range(40) for j in range(40) if i != j]
    assert found.mean_cosine == pytest.approx(np.mean(pairs), abs=1e-6)
    share = np.sqrt(np.linalg.eigvalsh(unit.T @ unit))
    share /= share.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert found.std_ratio == pytest.approx(unit.std(0).mean() * math.sqrt(7), rel=1e-5)
    assert found.spectrum[0] == 1
    assert np.allclose(np.sort(found.spectrum), np.sort(share / share.max()), atol=1e-6)


def test_vectors_of_zeros_are_measured_without_a_nan():
    found = measure(torch.zeros(5, 3))
    assert (found.mean_cosine, found.effective_rank, found.std_ratio) == (0, 0, 0)
    assert judge(found, "keys")[0] == "few dimensions"


def test_a_first_convolution_starts_at_its_closed_form_and_as_noise():
    torch.manual_seed(0)
    for width in (0.5, 1):
        network = ResNet(18, width=width)
        found = measure_filters(network.conv1.weight)
        assert found.norm == pytest.approx(INITIAL_NORM, rel=0.03)
        assert found.roughness == pytest.approx(1, abs=0.05)
        assert found.dead == 0
        state = {f"encoder_q.{k}": v for k, v in network.state_dict().items()}
        assert growth(state)[1] == pytest.approx(1, abs=0.1)
        state["encoder_q.layer3.0.conv1.weight"] *= 50
        assert growth(state) == (
            "layer3.0.conv1.weight",
            pytest.approx(50, rel=0.05),
        )


def test_flat_filters_are_smooth_checkerboards_rough_and_small_ones_dead():
    flat = torch.ones(4, 3, 7, 7)
    assert measure_filters(flat).roughness == 0
    board = (torch.arange(7)[:, None] + torch.arange(7)) % 2 * 2.0 - 1
    assert measure_filters(board.expand(4, 3, 7, 7)).roughness == pytest.approx(2)
    flat[1] *= 1e-3
    found = measure_filters(flat)
    assert found.dead == 1
    assert found.norms[1] == pytest.approx(math.sqrt(147))
    (said,) = (text for text in found.findings() if "dead" in text)
    assert "1 of 4 filters" in said


def test_weights_two_hundred_times_the_first_norm_are_told():
    torch.manual_seed(0)
    weight = ResNet(18).conv1.weight
    assert not any("grown" in text for text in measure_filters(weight).findings())
    (said,) = (t for t in measure_filters(200 * weight).findings() if "grown" in t)
    assert "has grown to 201 times the norm of a fresh layer" in said
    assert "SOLVER.BASE_LR" in said


def test_filters_are_drawn_weight_by_weight_grey_for_zero_and_dead():
    weight = torch.zeros(3, 3, 7, 7)
    weight[0, 0, 2, 3], weight[0, 1, 6, 6] = 2.0, -1.0
    weight[1] = 1.0
    weight[2] = 1e-6
    picture = draw_filters({"encoder_q": weight, "encoder_k": -weight})
    assert picture.shape == (3 * 88 - 4, 3 * 88 - 4, 3)
    first = picture[:84:12, :84:12]
    assert first[2, 3].tolist() == [255, 128, 128]
    assert first[6, 6].tolist() == [128, 64, 128]
    assert (first[0] == 128).all()
    assert (picture[:84, 88:172] == 255).all()
    assert (picture[:84, 176:] == 128).all()
    assert (picture[88:172] == 255).all()  # between the encoders
    assert (picture[176:, 88:172] == 0).all()


def test_neighbours_are_those_of_a_sort_and_never_the_query_itself():
    x = random_units(30, 5)
    x[7] = x[3]  # a copy
    numbers = torch.arange(30) * 2  # as where every second image could not be read
    queries = torch.tensor([3, 7, 20])
    found = nearest_neighbours(Features(x, numbers, ()), queries, 4)
    for row, query in enumerate(queries.tolist()):
        cosine = (x @ x[query]).tolist()
        others = sorted((i for i in range(30) if i != query), key=lambda i: -cosine[i])[:4]
        assert found.found[row].tolist() == [2 * i for i in others]
        assert found.cosine[row].tolist() == pytest.approx([cosine[i] for i in others], abs=1e-6)
    assert found.queries.tolist() == [6, 14, 40]
    names = ["even" if i % 4 else "odd" for i in range(60)]
    pairs = [
        names[q] == names[i]
        for q, row in zip(found.queries, found.found, strict=True)
        for i in row.tolist()
    ]
    assert found.same_class(names) == sum(pairs) / 12


def test_neighbours_among_more_copies_than_asked_for():
    x = torch.ones(12, 3)
    found = nearest_neighbours(Features(x, torch.arange(12), ()), torch.arange(12), 3)
    assert found.found.shape == (12, 3)
    assert not (found.found == torch.arange(12)[:, None]).any()
    assert nearest_neighbours(Features(x[:3], torch.arange(3), ()), torch.arange(3), 9).found.shape
    assert torch.allclose(found.cosine, torch.ones(12, 3))


def test_prototypes_are_counted_by_their_nearest_embeddings():
    centres = torch.eye(8)
    even = prototype_use(torch.eye(8)[torch.arange(40) % 4] * 3, centres * 5)
    assert (even["prototypes"], even["used"]) == (8, 4)
    assert even["perplexity"] == pytest.approx(4)
    assert even["largest_share"] == pytest.approx(0.25)
    assert even["mean_cosine"] == pytest.approx(0, abs=1e-9)
    assert "in use" in judge_prototypes(even, 40, "Do this.")
    one = prototype_use(torch.eye(8)[:1].expand(40, 8), centres)
    assert (one["used"], one["perplexity"]) == (1, pytest.approx(1))
    assert "collapsed" in judge_prototypes(one, 40, "Do this.")


def records(loss, accuracy, spread, n=30):
    keys = ("iteration", "loss", "accuracy", "spread")
    return [dict(zip(keys, (20 * i, loss, accuracy, spread), strict=True)) for i in range(1, n)]


def test_the_end_of_a_run_is_judged_and_not_its_start():
    plateau, healthy = records(6.93, 0.0, 0.01), records(5.0, 0.4, 0.8)
    assert "collapsed" in last_words(plateau, 6.93, 200)[0]
    for i, record in enumerate(healthy):
        record["iteration"] += plateau[-1]["iteration"] + 20 * i
    assert last_words([*plateau, *healthy], 6.93, 200) == []
    assert "collapsed" in last_words(plateau, None, 200)[0]
    assert last_words(records(6.93, 0.0, 0.8), None, 200) == []
    assert last_words(plateau[:5], 6.93, 200) == []
    assert last_words([{"iteration": 900, "loss": 1.0}], 6.93, 200) == []


def test_curves_show_what_was_recorded_and_chance():
    one = [*records(6.0, 0.1, 0.5), {"iteration": 600, "loss": math.nan, "knn_top1": 40.0}]
    figure = draw_curves({"a": one, "b": records(5.0, 0.2, 0.5)}, chance_loss=6.93)
    titles = [axis.get_title() for axis in figure.axes if axis.axison]
    assert titles == [
        "loss",
        "contrastive accuracy (%)",
        "spread of the embeddings",
        "kNN accuracy (%)",
    ]
    lines = figure.axes[0].get_lines()
    assert list(lines[0].get_xdata()) == [20 * i for i in range(1, 30)]  # without the NaN
    assert set(lines[1].get_ydata()) == {5.0}
    assert list(lines[2].get_ydata()) == [6.93, 6.93]
    assert list(figure.axes[1].get_lines()[0].get_ydata())[:1] == [10.0]
    assert draw_curves({"a": []}) is None

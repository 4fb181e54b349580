"""Training curves: what is drawn, smoothed and refused."""

import json
import math

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from moco_common.errors import UserError
from moco_common.figures import save_figure
from moco_det.report import curves as plots


def write_metrics(folder, **series):
    folder.mkdir(parents=True)
    rows = zip(*series.values(), strict=True)
    records = [
        {"iteration": i, **dict(zip(series, row, strict=True))} for i, row in enumerate(rows)
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figure that is being saved, to look at its lines."""
    kept: list[Figure] = []

    def keep(figure, path):
        kept.append(figure)
        return save_figure(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return kept


def test_smoothing_is_a_centred_mean_by_a_naive_loop():
    values = np.random.default_rng(0).normal(size=23)
    for window in (1, 3, 8):
        expected = []
        for i in range(len(values)):
            reach = min(window // 2, i, len(values) - 1 - i)
            expected.append(sum(values[i - reach : i + reach + 1]) / (2 * reach + 1))
        assert plots.smooth(values, window) == pytest.approx(expected)


def test_smoothing_leaves_a_straight_line_straight():
    line = np.arange(50.0)
    assert plots.smooth(line, 9) == pytest.approx(line)


def test_curves_pass_through_the_logged_values(tmp_path, drawn):
    run = write_metrics(tmp_path / "a", total_loss=[3.0, 2.0, 1.5])
    path = plots.training_curves({"mine": run}, tmp_path / "curves.png")
    assert cv2.imread(str(path)).shape[2] == 3
    (axis,) = drawn[0].axes
    assert axis.get_title() == "total loss"
    assert axis.lines[0].get_xydata().tolist() == [[0, 3], [1, 2], [2, 1.5]]


def test_runs_of_one_label_share_its_colour_and_one_entry(tmp_path, drawn):
    runs = {
        "a": [write_metrics(tmp_path / f"a{i}", total_loss=[3, 2 + i]) for i in range(2)],
        "b": write_metrics(tmp_path / "b", total_loss=[3, 1]),
    }
    plots.training_curves(runs, tmp_path / "c.png")
    colors = [line.get_color() for line in drawn[0].axes[0].lines]
    assert colors[0] == colors[1] != colors[2]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    ("config", "recorded", "level"),
    [
        ("METHOD: byol\nMOCO: {QUEUE_SIZE: 1024}", 2.5, 2.5),
        ("METHOD: moco\nMOCO: {QUEUE_SIZE: 1024}", None, math.log(1025)),
        ("MOCO: {QUEUE_SIZE: 1024}", None, math.log(1025)),  # of the first versions
        (
            "METHOD: memory-bank\nMOCO: {QUEUE_SIZE: 1024}\nBANK: {NEGATIVES: 64}",
            None,
            math.log(65),
        ),
        ("METHOD: simclr\nMOCO: {QUEUE_SIZE: 1024}", None, None),
    ],
)
def test_pretraining_loss_comes_with_the_chance_loss_of_its_method(
    tmp_path, drawn, config, recorded, level
):
    chance = {} if recorded is None else {"chance_loss": [recorded] * 2}
    run = write_metrics(tmp_path / "a", loss=[7, 6.5], accuracy=[0, 0.1], **chance)
    (run / "config.yaml").write_text(config)
    plots.training_curves({"a": run}, tmp_path / "c.png")
    loss, accuracy = drawn[0].axes
    assert len(loss.lines) == (1 if level is None else 2)
    if level is not None:
        assert list(loss.lines[-1].get_ydata()) == pytest.approx([level] * 2)
        assert loss.texts[0].get_text() == f"chance {level:.2f}"
    assert len(accuracy.lines) == 1


def test_values_that_are_no_numbers_are_left_out(tmp_path, drawn):
    run = write_metrics(tmp_path / "a", total_loss=[3, float("nan"), None, 1])
    plots.training_curves({"a": run}, tmp_path / "c.png")
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == [0, 3]


def test_nothing_to_draw_is_an_error_that_names_the_keys(tmp_path):
    run = write_metrics(tmp_path / "a", total_loss=[3, 2])
    with pytest.raises(UserError, match="has none of nonsense"):
        plots.training_curves({"a": run}, tmp_path / "c.png", keys=["nonsense"])
    with pytest.raises(UserError, match="missing or empty"):
        plots.training_curves({"b": tmp_path}, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()

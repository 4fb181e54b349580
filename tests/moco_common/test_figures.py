"""Figures: fonts, panels, and the formats they are written in."""

import math

import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from moco_common import figures


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 3, 1), (3, 3, 1), (5, 3, 2), (7, 4, 2)])
def test_panels_fill_rows_and_the_rest_is_blank(count, columns, rows):
    figure, axes = figures.panels(count, columns, (3.0, 2.0), margin=0.5)
    assert len(axes) == count
    assert tuple(figure.get_size_inches()) == (3.0 * min(count, columns), 2.0 * rows + 0.5)
    assert sum(axis.axison for axis in figure.axes) == count


def test_a_chance_line_lies_at_its_level_and_names_it():
    figure, (axis,) = figures.panels(1, 1, (3.0, 2.0), margin=0.0)
    figures.chance_line(axis, math.log(17))
    (line,) = axis.get_lines()
    assert list(line.get_ydata()) == [math.log(17)] * 2
    assert axis.texts[0].get_text() == "chance 2.83"


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a", "PNG")])
def test_the_suffix_selects_the_format_and_a_pixel_stays_a_pixel(tmp_path, name, kind):
    path = figures.save_figure(Figure(figsize=(2.0, 1.0), dpi=figures.DPI), tmp_path / name)
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == (kind, (200, 100))


def test_an_svg_is_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setitem(rcParams, "svg.hashsalt", "x")
    files = [figures.save_figure(Figure(), tmp_path / f"{i}.svg").read_bytes() for i in range(2)]
    assert files[0] == files[1]
    assert b"<svg" in files[0]


def test_a_font_with_chinese_is_found_by_its_characters_or_its_absence_said_once(
    monkeypatch, capsys
):
    class Entry:
        def __init__(self, name, signs):
            self.name, self.fname, self.signs = name, name, signs

        def get_char_index(self, sign):
            return int(chr(sign) in self.signs)

    latin, chinese = Entry("Latin", "abc"), Entry("Any Name", "abc中")
    files = {entry.fname: entry for entry in (latin, chinese)}
    monkeypatch.setattr(figures, "get_font", files.__getitem__)
    for installed, expected, warnings_ in (
        ([latin, chinese], ["DejaVu Sans", "Any Name"], 0),
        ([latin], ["DejaVu Sans"], 1),
    ):
        figures.fonts.cache_clear()
        monkeypatch.setattr(figures.fontManager, "ttflist", installed)
        assert figures.fonts() == expected
        assert [figures.literal(name) for name in ("猫", "犬", "cat$")] == ["猫", "犬", r"cat\$"]
        assert capsys.readouterr().err.count("warning: ") == warnings_
    figures.fonts.cache_clear()

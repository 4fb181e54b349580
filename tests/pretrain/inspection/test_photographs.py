"""moco-data on photographs: what is there, what cannot be read, and the contact sheet."""

import json

import numpy as np
import pytest
from PIL import Image

from moco_common.errors import UserError
from pretrain.inspection.photographs import survey_photographs


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for number, size in enumerate([(30, 40, 3), (50, 20, 3), (10, 10, 3)]):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(path)
    return folder


def survey(capsys, folder, **options):
    status = survey_photographs([str(folder)], as_json=True, **options)
    return status, json.loads(capsys.readouterr().out)


def test_photographs_are_counted_by_format_size_and_folder(photos, capsys):
    status, found = survey(capsys, photos)
    assert status == 0
    assert found["images"] == 3
    assert found["formats"] == {"PNG": 3}
    assert list(found["sizes"].values()) == [[10, 10], [20, 50], [40, 30]]
    assert found["class_folders"] == {"class0": 2, "class1": 1}


def test_a_broken_photograph_is_named_by_decoding_all(photos, capsys):
    path = photos / "class0" / "0.png"
    path.write_bytes(path.read_bytes()[:-900])
    assert survey(capsys, photos)[0] == 0
    status, found = survey(capsys, photos, check_images=True)
    assert status == 1
    assert list(found["unreadable"]) == [str(path)]


def test_copies_are_named(photos, capsys):
    (photos / "again.png").write_bytes((photos / "class0/0.png").read_bytes())
    assert survey_photographs([str(photos)]) == 0
    out = capsys.readouterr().out
    assert "1 repeat the content of another" in out
    assert "again.png" in out


def test_annotations_beside_photographs_are_mentioned(photos, capsys):
    (photos / "class0/0.xml").write_text("<annotation/>")
    survey_photographs([str(photos)])
    assert "to read annotations, write voc:DIR" in capsys.readouterr().out


def test_a_sheet_is_never_put_among_the_photographs_or_over_another_file(photos, tmp_path, capsys):
    assert survey(capsys, photos, sheet=tmp_path / "sheet.png")[0] == 0
    assert Image.open(tmp_path / "sheet.png").size[0] > 3 * 240
    survey(capsys, photos, sheet=tmp_path / "sheet.png")
    with pytest.raises(UserError, match="would lie among the images"):
        survey_photographs([str(photos)], sheet=photos / "class0" / "sheet.png")
    other = tmp_path / "photo.jpg"
    Image.new("RGB", (5, 5)).save(other)
    with pytest.raises(UserError, match="is not replaced"):
        survey_photographs([str(photos)], sheet=other)

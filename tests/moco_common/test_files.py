"""Which files a tool may write over."""

import os
from pathlib import Path

import pytest

from moco_common.errors import UserError
from moco_common.files import protecting, replace_text


@pytest.mark.parametrize("way", ["same", "relative", "link", "hard link", "through a folder link"])
def test_an_input_is_not_written_over_by_whatever_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    source, other = tmp_path / "input", tmp_path / "other"
    source.write_text("precious")
    monkeypatch.chdir(tmp_path)
    target = {"same": source, "relative": Path("../", tmp_path.name, "./input")}.get(way, other)
    if way == "link":
        other.symlink_to(source)
    elif way == "hard link":
        os.link(source, other)
    elif way == "through a folder link":
        other.symlink_to(tmp_path)
        target = other / "input"
    with protecting([source, tmp_path / "absent"]), pytest.raises(UserError, match="is an input"):
        replace_text(target, "lost")
    assert source.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) in (["input"], ["input", "other"])
    replace_text(target, "after the block")
    assert target.read_text() == "after the block"


def test_a_pipe_a_device_and_a_folder_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(UserError, match="not a regular file"):
            replace_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()

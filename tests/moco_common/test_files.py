"""A writer replaces regular files only, and whole."""

import os
import stat

import pytest

from moco_common.errors import UserError
from moco_common.files import new_beside, put_in_place, replace_file, replace_text


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(UserError, match="not a regular file"):
        replace_text(tmp_path / "a", "x")
    assert stat.S_ISFIFO((tmp_path / "a").stat().st_mode)


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="not a regular file"):
        replace_text(tmp_path / "a", "x")
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("link", [False, True])
def test_a_device_is_not_replaced(tmp_path, link):
    device = tmp_path / "null"
    if link:
        device.symlink_to("/dev/null")
    else:
        try:
            os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except OSError:
            pytest.skip("only root may make a device")
    with pytest.raises(UserError, match="not a regular file"):
        replace_text(device, "x")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert device.is_symlink() == link
    assert [path.name for path in tmp_path.iterdir()] == ["null"]


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path, there):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far/a", tmp_path / "link"
    if there:
        target.write_text("before")
    link.symlink_to(target)
    replace_text(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    unfinished = new_beside(link)
    assert unfinished.parent == target.parent  # the same file system, so that a rename is atomic
    unfinished.write_text("again")
    put_in_place(unfinished, link)
    assert link.is_symlink()
    assert target.read_text() == "again"
    assert [path.name for path in target.parent.iterdir()] == ["a"]


def test_a_failed_write_leaves_what_a_link_points_to(tmp_path):
    (tmp_path / "a").write_text("before")
    (tmp_path / "link").symlink_to("a")

    def write(file):
        file.write(b"half")
        raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        replace_file(tmp_path / "link", write)
    assert (tmp_path / "link").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]

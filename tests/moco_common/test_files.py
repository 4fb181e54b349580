"""A writer replaces regular files only, and whole; a reader opens no others."""

import errno
import json
import os
import resource
import stat
import threading

import pytest
import torch

from moco_common import files
from moco_common.errors import UserError
from moco_common.files import (
    append_text,
    full_disk_left_to_caller,
    is_full_disk,
    link_file,
    make_folder,
    new_beside,
    open_regular,
    protecting,
    put_in_place,
    remove_unfinished,
    replace_file,
    replace_text,
    replacing,
    write_json_atomically,
)


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


def open_handles():
    return len(os.listdir("/proc/self/fd"))


def test_a_file_is_opened_up_to_its_limit_and_no_other_kind_of_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    before = open_handles()
    for most in (5, None):
        with open_regular(path, most) as file:
            assert file.read() == b"12345"
    with pytest.raises(OSError, match="has 5 bytes, more than the limit of 4"):
        open_regular(path, 4)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(OSError, match="pipe is not a regular file") as refusal:
        open_regular(tmp_path / "pipe")
    assert not isinstance(refusal.value, IsADirectoryError)
    assert open_handles() == before


def test_a_folder_for_results_is_made_with_those_above_it_or_taken_as_it_is(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "a/b", "-o")
        assert list((tmp_path / "a").iterdir()) == [tmp_path / "a/b"]
        assert not list((tmp_path / "a/b").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written .*choose another folder with -o"):
        make_folder(tmp_path / "file", "-o")


def test_a_writer_returns_its_path_and_makes_the_folders_above_it(tmp_path):
    path = tmp_path / "a/b/c"
    assert replace_text(str(path), "é") == path
    assert path.read_bytes() == "é".encode()
    write_json_atomically(path, {"x": [1, None]})
    assert json.loads(path.read_text()) == {"x": [1, None]}
    append_text(path, " é")
    assert path.read_text() == '{"x": [1, null]} é'


def test_an_unfinished_file_is_hidden_and_named_after_its_target_until_it_is_in_place(tmp_path):
    target = tmp_path / "curve.png"
    with replacing(target, suffix=".png") as unfinished:
        assert unfinished.parent == tmp_path
        assert unfinished.name.startswith(".curve.png.")
        assert unfinished.name.endswith(".part.png")
        unfinished.write_text("whole")
        assert not target.exists()
    assert list(tmp_path.iterdir()) == [target]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        replace_text(tmp_path / "a", "x")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_content_and_name_reach_the_disk_before_a_writer_returns(tmp_path, monkeypatch):
    """The file before it takes its name, the folder after it, as a power failure requires."""
    order = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        order.append("folder" if name == str(tmp_path) else "file")
        fsync(handle)

    def watched_replace(source, target):
        order.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    replace_text(tmp_path / "a", "x")
    assert order == ["file", "name", "folder"]
    order.clear()
    link_file(tmp_path / "a", tmp_path / "b")
    assert order == ["name", "folder"]


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_flush_a_folder_is_no_failure(
    tmp_path, monkeypatch, number, passes
):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    before = open_handles()
    if passes:
        files.sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            files.sync_folder(tmp_path)
    assert open_handles() == before


def test_a_check_that_fails_keeps_the_old_file(tmp_path):
    path = replace_text(tmp_path / "a", "before")

    def check(unfinished):
        assert unfinished.read_text() == "after"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        replace_file(path, lambda file: file.write(b"after"), check)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_input_is_replaced_by_no_path_while_it_is_protected(tmp_path):
    source = replace_text(tmp_path / "a", "input")
    os.link(source, tmp_path / "other")
    with protecting([source, tmp_path / "missing"]):
        for path in (source, tmp_path / "other"):
            with pytest.raises(UserError, match="is an input"):
                replace_text(path, "output")
        replace_text(tmp_path / "missing", "x")
        source.unlink()
        replace_text(tmp_path / "other", "output")
    replace_text(source, "output")


def test_a_link_is_another_name_of_the_file_or_a_copy_of_it(tmp_path, monkeypatch):
    path = replace_text(tmp_path / "a", "x")
    (tmp_path / ".last.part").write_text("of a killed process")
    (tmp_path / "last").write_text("before")
    link_file(path, tmp_path / "last")
    assert (tmp_path / "last").samefile(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "last"]

    def no_links(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    link_file(path, tmp_path / "copy")
    assert not (tmp_path / "copy").samefile(path)
    assert (tmp_path / "copy").read_text() == "x"


def test_only_the_files_of_killed_writers_are_removed(tmp_path):
    new_beside(tmp_path / "a")
    new_beside(tmp_path / "a", ".png")
    for name in ("a", ".hidden", "b.part"):
        (tmp_path / name).write_text("")
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "a", "b.part"]


@pytest.fixture
def small_disk():
    """Files of at most 1000 bytes: what is beyond fails with EFBIG, like a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: replace_text(path, "x" * 2000),
        lambda path: append_text(path, "x" * 2000),
        lambda path: replace_file(path, lambda file: torch.save(torch.zeros(2000), file)),
    ],
    ids=["text", "append", "torch.save"],
)
def test_a_full_disk_is_one_sentence_whoever_writes(tmp_path, write):
    """torch.save swallows the OSError and raises a RuntimeError about what follows from it."""
    with pytest.raises(UserError, match="a could not be written .*free some space"):
        write(tmp_path / "a")
    assert not list(tmp_path.glob(".*"))


def test_an_error_of_the_writer_itself_is_not_a_full_disk(tmp_path):
    def write(file):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        replace_file(tmp_path / "a", write)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, ""), True),
        (OSError(errno.EDQUOT, ""), True),
        (OSError(errno.EFBIG, ""), True),
        (OSError(errno.EACCES, ""), False),
        (RuntimeError(errno.ENOSPC), False),
        (None, False),
    ],
)
def test_which_errors_are_a_full_disk(error, full):
    assert is_full_disk(error) == full


def test_only_a_threads_full_disk_is_left_to_the_caller(monkeypatch):
    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(args.exc_value))

    def fail(error):
        raise error

    bug, full = ValueError("a bug"), OSError(errno.ENOSPC, "")
    hook = threading.excepthook
    with full_disk_left_to_caller():
        for error in (full, bug):
            thread = threading.Thread(target=fail, args=[error])
            thread.start()
            thread.join()
    assert reported == [bug]
    assert threading.excepthook is hook


def test_an_error_after_the_file_has_its_name_is_reported_as_itself(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(files, "sync_folder", fail)
    with pytest.raises(OSError, match="lost"):
        replace_text(tmp_path / "a", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

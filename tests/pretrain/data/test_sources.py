import json
import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from moco_common.errors import UserError
from pretrain.data.sources import open_source


@pytest.fixture
def tree(tmp_path):
    """Two class folders, one of them nested, with a hidden file and one that is no image."""
    for path in ("b/2.jpg", "b/10.JPEG", "a/deep/er/x.png", "a/y.webp", "a/.z.jpg", "b/notes.md"):
        file = tmp_path / "tree" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())
    return tmp_path / "tree"


def names(source, root):
    return [source.name(i).removeprefix(f"{root}/") for i in range(len(source))]


def test_a_folder_is_walked_in_a_fixed_order_without_hidden_files(tree):
    source = open_source(str(tree))
    assert names(source, tree) == ["a/y.webp", "a/deep/er/x.png", "b/10.JPEG", "b/2.jpg"]
    assert [source.read(i) for i in range(4)] == [name.encode() for name in names(source, tree)]


def test_labels_are_the_topmost_folders(tree):
    source = open_source(str(tree))
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [0, 0, 1, 1]


def test_a_flat_folder_has_no_labels(tree):
    source = open_source(str(tree / "b"))
    assert source.classes == ()
    assert source.labels is None


def test_links_are_followed_but_not_in_circles(tree):
    (tree / "a" / "up").symlink_to(tree)
    (tree / "c").symlink_to(tree / "b")
    assert names(open_source(str(tree)), tree)[-2:] == ["c/10.JPEG", "c/2.jpg"]
    assert len(open_source(str(tree))) == 6


def test_a_list_file_keeps_its_order_and_is_relative_to_itself(tree):
    absolute = str(tree / "a" / "y.webp")
    (tree / "list.txt").write_bytes(b"\xef\xbb\xbfb/2.jpg\r\n\n" + absolute.encode() + b"\n")
    source = open_source(str(tree / "list.txt"))
    assert [source.name(i) for i in range(len(source))] == [str(tree / "b/2.jpg"), absolute]
    assert source.read(0) == b"b/2.jpg"


def test_a_coco_file_lists_images_in_its_order(tree):
    (tree / "c.json").write_text(json.dumps({"images": [{"file_name": "b/2.jpg"}]}))
    source = open_source(f"coco:{tree}/c.json:{tree}")
    assert names(source, tree) == ["b/2.jpg"]
    assert source.read(0) == b"b/2.jpg"


def test_sources_are_concatenated_and_share_classes(tree, tmp_path):
    other = tmp_path / "other" / "b" / "new.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"new")
    (tree / "list.txt").write_text("b/2.jpg\n")
    source = open_source([str(tmp_path / "other"), str(tree / "list.txt"), str(tree)])
    assert [source.read(i) for i in (0, 1, 2, 5)] == [b"new", b"b/2.jpg", b"a/y.webp", b"b/2.jpg"]
    assert source.labels.tolist() == [1, -1, 0, 0, 1, 1]


def test_file_names_need_not_be_utf8(tmp_path):
    (tmp_path / "caf\udce9.jpg").write_bytes(b"latin-1")
    source = open_source(str(tmp_path))
    assert source.read(0) == b"latin-1"
    assert Path(source.name(0)).read_bytes() == b"latin-1"


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_is_an_error(tree, index):
    with pytest.raises(IndexError):
        open_source(str(tree)).read(index)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{root}/nowhere", "does not exist"),
        ("{root}/empty", "contains no images"),
        ("{root}/empty.txt", "contains no images"),
        ("{root}/photo.jpg", "neither a folder"),
        ("coco:{root}/bad.json", "coco:JSON:IMAGES"),
        ("coco:{root}/bad.json:{root}/empty", "not a COCO file"),
        ("coco:{root}/list.json:{root}/empty", "not a COCO file"),
        ("coco:{root}/none.json:{root}/empty", "cannot read"),
        ("coco:{root}/null.json:{root}/empty", "null.json is not a COCO .*number 1 has null"),
        ("coco:{root}/number.json:{root}/empty", "number 0 has 7"),
        ("coco:{root}/surrogate.json:{root}/empty", "number 0 has"),
        ("coco:{root}/zero.json:{root}/empty", "number 0 has"),
        ("coco:{root}/deep.json:{root}/empty", "not a COCO file"),
        ("coco:{root}/pipe:{root}/empty", "pipe is not a regular file"),
        ("{root}/utf16.txt", "utf16.txt, line 1, is not a path: save the list as UTF-8"),
        ("{root}/binary.txt", "binary.txt, line 2, is not a path"),
        ("{root}/line.txt", "line.txt, line 1, is not a path"),
        ("{root}/pipe.txt", "pipe.txt is not a regular file"),
        ("coco:{root}/bad.json:{root}/nowhere", "does not exist"),
    ],
)
def test_a_wrong_source_is_one_clear_error(tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    for name, text in {
        "empty.txt": "\n",
        "photo.jpg": "x",
        "bad.json": "{",
        "list.json": "[1]",
        "null.json": '{"images": [{"file_name": "a.jpg"}, {"file_name": null}]}',
        "number.json": '{"images": [{"file_name": 7}]}',
        "surrogate.json": '{"images": [{"file_name": "\\ud800.jpg"}]}',
        "zero.json": '{"images": [{"file_name": "\\u0000.jpg"}]}',
        "deep.json": "[" * 10**6,
        "binary.txt": "a.jpg\n\0\n",
        "line.txt": "a" * 10**6,
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "utf16.txt").write_text("a.jpg\nb.jpg\n", encoding="utf-16")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=message):
        open_source(spec.format(root=tmp_path))


def test_no_source_at_all_is_an_error():
    with pytest.raises(UserError, match="no image source"):
        open_source([])


def picture(kind):
    stream = BytesIO()
    Image.new("RGB", (9, 8), (200, 30, 30)).save(stream, kind)
    return stream.getvalue()


def test_pictures_are_recognised_by_content_and_other_files_counted_by_ending(tmp_path):
    files = {
        "a.jfif": picture("JPEG"),
        "b.avif": b"known by its name",
        "c": picture("PNG"),
        "d.picture": picture("WEBP"),
        "Screenshot at 10.11.02": picture("BMP"),
        "e.heic": b"\0\0\0\x18ftypheic" + bytes(50),
        "f.HEIC": b"\0\0\0\x18ftypheic" + bytes(50),
        "g.xml": picture("PNG"),  # an ending of other files is not looked into
        "h": b"text",
        "i.psd": b"8BPS",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    source = open_source(str(tmp_path))
    found = ["Screenshot at 10.11.02", "a.jfif", "b.avif", "c", "d.picture"]
    assert names(source, tmp_path) == found
    (note,) = source.notes
    assert note.startswith(f"{tmp_path}: 5 files passed over (2 .heic, ")
    for part in ("1 .xml", "1 .psd", "1 without a known ending", "convert HEIC to JPEG to use it"):
        assert part in note


def test_a_folder_of_nothing_but_other_files_is_an_error_that_counts_them(tmp_path):
    for name in ("a.heic", "b.heic", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images \(3 files passed over \(2 \.heic, 1 \.txt"):
        open_source(str(tmp_path))


def test_entries_that_cannot_be_entered_are_skipped_and_named(tree, monkeypatch):
    (tree / "loop").symlink_to("loop")
    (tree / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(tree / "pipe.jpg")
    (tree / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(folder):  # root may enter any folder
        if folder.endswith(b"lost+found"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    source = open_source(str(tree))
    assert names(source, tree) == ["a/y.webp", "a/deep/er/x.png", "b/10.JPEG", "b/2.jpg"]
    (note,) = source.notes
    assert "4 items unreadable (first " in note
    monkeypatch.setattr(os, "scandir", lambda _: scandir(tree / "nowhere"))
    with pytest.raises(UserError, match="cannot read the folder .*: No such file"):
        open_source(str(tree))


def test_a_list_that_cannot_be_read_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a.jpg")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="cannot read the list .*a.txt: Permission denied"):
        open_source(str(tmp_path / "a.txt"))


def test_folders_may_be_nested_deeper_than_python_recurses(tmp_path):
    deepest = tmp_path
    for _ in range(1200):
        deepest /= "d"
        deepest.mkdir()
    (deepest / "x.jpg").write_bytes(b"x")
    assert len(open_source(str(tmp_path))) == 1
    for folder in (deepest, *deepest.parents):  # shutil, too, recurses
        if folder == tmp_path:
            break
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_coco_file_may_begin_with_a_byte_order_mark(tree, encoding):
    text = json.dumps({"images": [{"file_name": "b/2.jpg"}]})
    (tree / "c.json").write_text(text, encoding=encoding)
    assert names(open_source(f"coco:{tree}/c.json:{tree}"), tree) == ["b/2.jpg"]

import json
from pathlib import Path

import pytest

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
    }.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(spec.format(root=tmp_path))


def test_no_source_at_all_is_an_error():
    with pytest.raises(UserError, match="no image source"):
        open_source([])

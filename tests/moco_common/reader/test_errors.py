"""An error of the reader keeps what it knows; each kind of failure has its own sentence."""

import errno
import os
import pickle
from pathlib import Path

import pytest

from moco_common.reader.errors import (
    FILE_ERRORS,
    CheckpointError,
    MalformedError,
    RefusedError,
    TruncatedError,
    UnsafePickleError,
    explain,
    is_out_of_memory,
    refuse_other_formats,
)

PATH = Path("a.pth")


def test_an_error_keeps_its_sentence_and_facts_and_names_the_file_once():
    facts = {"kind": "shape", "key": "w", "candidates": ("a", "b"), "details": "a table"}
    error = CheckpointError("it does not fit", **facts)
    assert str(error) == "it does not fit"
    assert error.path is None
    named = error.at(PATH)
    assert isinstance(named, CheckpointError)
    assert str(named) == "a.pth: it does not fit"
    assert named.path == PATH
    assert {name: getattr(named, name) for name in facts} == facts
    assert named.at(Path("b.pth")) is named
    assert CheckpointError("x", kind="empty", path="b.pth").path == Path("b.pth")
    assert str(RefusedError("html", "is a web page")) == "is a web page"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RefusedError("html", "is  a\nweb page"), "html", "a.pth is a web page."),
        (UnsafePickleError("os.system"), "hostile", "a.pth asks for os.system to be called"),
        (FileNotFoundError(errno.ENOENT, "absent"), "missing_file", "does not exist"),
        (IsADirectoryError("is not a regular file"), "missing_file", "is a directory"),
        (OSError("is not a regular file"), "unreadable", "is a pipe, device or socket"),
        (OSError(errno.EIO, "Input/output error"), "unreadable", r"\(Input/output error\)"),
        (OSError(errno.EINVAL, "Invalid argument"), "damaged", "is damaged .*Invalid argument"),
        (TruncatedError(), "truncated", "ends after 7 bytes"),
        (EOFError(), "truncated", "ends after 7 bytes"),
        (pickle.UnpicklingError("pickle data was truncated"), "truncated", "ends after 7 bytes"),
        (pickle.UnpicklingError("pickle exhausted"), "truncated", "ends after 7 bytes"),
        (RecursionError(), "damaged", "nested too deeply"),
        (MalformedError("no mark"), "damaged", r"is damaged or not a checkpoint \(no mark\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_failure_has_its_kind_and_sentence(error, kind, words):
    assert isinstance(error, FILE_ERRORS)
    explained = explain(error, PATH, 7, b"\x80\x02\xff")
    assert (explained.kind, explained.path) == (kind, PATH)
    assert explained.key == ("os.system" if kind == "hostile" else None)
    with pytest.raises(CheckpointError, match=words):
        raise explained
    assert "\n" not in str(explained)


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"# Notes\n\tx", "unknown_format"), (b"# \x00", "damaged"), ("é".encode(), "damaged")],
)
def test_text_is_not_a_damaged_checkpoint(head, kind):
    assert explain(MalformedError("x"), PATH, 7, head).kind == kind


def test_a_cause_is_shortened():
    sentence = str(explain(RefusedError("html", "x" * 999), PATH, 7, b""))
    assert sentence == f"a.pth {'x' * 160}."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, ""), True),
        (OSError(errno.EIO, os.strerror(errno.ENOMEM)), False),
        (RuntimeError(f"mmap: {os.strerror(errno.ENOMEM)} (12)"), True),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_which_errors_mean_that_memory_is_used_up(error, expected):
    assert is_out_of_memory(error) == expected


def at(offset, content):
    return bytes(offset) + content + bytes(512 - offset - len(content))


@pytest.mark.parametrize(
    ("head", "kind", "words"),
    [
        (b"<!DOCTYPE html>", "html", "web page"),
        (b"\xef\xbb\xbf \r\n\t<HTML>", "html", "web page"),
        (b"<?xml version='1.0'?>", "html", "web page"),
        (b"<head>", "html", "web page"),
        (b"<Error>Denied", "html", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "lfs_pointer", "git lfs pull"),
        (at(257, b"ustar"), "unsupported", "tar archive"),
        (b"\x89HDF\r\n", "unknown_format", "HDF5"),
        (b"\x1f\x8b\x08", "unknown_format", "gzip"),
        (b"BZh9", "unknown_format", "bzip2"),
        (b"\xfd7zXZ\x00", "unknown_format", "xz"),
        (b"\x28\xb5\x2f\xfd", "unknown_format", "zstandard"),
        (b"Rar!\x1a", "unknown_format", "RAR"),
        (b"7z\xbc\xaf\x27", "unknown_format", "7-zip"),
        (b"\x93NUMPY\x01", "unknown_format", "NumPy"),
        (b"\x89PNG\r\n", "unknown_format", "PNG"),
        (b"\xff\xd8\xff\xe0", "unknown_format", "JPEG"),
        (b"%PDF-1.4", "unknown_format", "PDF"),
        (b'  {"a": 1}', "unknown_format", "JSON"),
        (b"[{}]", "unknown_format", "JSON"),
    ],
)
def test_other_formats_are_known_by_their_first_bytes(head, kind, words):
    with pytest.raises(RefusedError, match=words) as caught:
        refuse_other_formats(head)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "head", [b"", b"PK\x03\x04", b"\x80\x02}q", at(258, b"ustar"), b"a version https://git-lfs"]
)
def test_other_first_bytes_are_left_to_the_readers(head):
    assert refuse_other_formats(head) is None

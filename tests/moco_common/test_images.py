import io
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageOps

from moco_common import images
from moco_common.errors import UserError
from moco_common.files import open_regular, read_regular
from moco_common.images import (
    DecodeError,
    RefusedImageError,
    check_picture,
    is_picture,
    read_picture,
)
from moco_det.data.datasets.image_frame import read_header
from moco_det.inference.predictor import load_image
from pretrain.data.decoding import decode

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
READERS = {
    f.__name__: f for f in (read_regular, read_picture, check_picture, read_header, load_image)
}


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program called gs that leaves a mark wherever it is started."""
    tools, mark = tmp_path / "tools", tmp_path / "started"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    return mark


def test_postscript_that_is_called_a_jpeg_starts_nothing(tmp_path, ghostscript):
    path = tmp_path / "x.jpg"
    path.write_bytes(POSTSCRIPT)
    assert read_header(path) == "image unreadable"
    for arm in (read_picture, check_picture, load_image, lambda path: decode(path.read_bytes())):
        with pytest.raises((DecodeError, UserError), match="not an image of a known format"):
            arm(path)
    assert not is_picture(path)
    assert not ghostscript.exists()
    with suppress(OSError), Image.open(path) as image:  # what Pillow does by itself
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("kind", ["TGA", "ICO", "PCX", "SGI", "DDS", "JPEG2000", "IM", "PDF"])
def test_a_format_that_is_not_on_the_list_is_no_picture(kind, tmp_path):
    data = encoded(Image.fromarray(COLOURS), kind)
    with pytest.raises(DecodeError, match="not an image of a known format"):
        decode(data)
    (tmp_path / "x.png").write_bytes(data)
    assert read_header(tmp_path / "x.png") == "image unreadable"


def make(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        with path.open("wb") as file:
            file.write(b"\xff\xd8\xff")
            file.truncate(12 * 2**30)


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder", "socket", "sparse file"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_ordinary_file_is_neither_waited_for_nor_read(
    kind, reader, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # a socket's path has a short limit
    make(kind, Path("x.jpg"))
    found = []

    def work():
        try:
            found.append(READERS[reader]("x.jpg"))
        except Exception as error:  # looked at below
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    (error,) = found  # a thread that hangs has found nothing
    text = str(error)
    assert "unreadable" in text or "x.jpg" in text
    if kind == "sparse file":
        with pytest.raises(OSError, match="12,884,901,888 bytes, more than the limit"):
            read_regular("x.jpg")
    elif kind != "socket":  # which cannot even be opened
        with pytest.raises(OSError, match="is not a regular file"):
            open_regular("x.jpg")


def test_no_handle_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "no").write_bytes(b"no image")
    (tmp_path / "yes").write_bytes(encoded(Image.fromarray(COLOURS), "PNG"))
    for _ in range(5):
        assert not is_picture(tmp_path / "pipe")
        assert not is_picture(tmp_path / "no")
        assert is_picture(tmp_path / "yes")
        read_picture(tmp_path / "yes")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"])
def test_pixels_are_those_of_detectron2(kind, mode, order, tmp_path):
    try:
        (tmp_path / "x").write_bytes(encoded(Image.fromarray(COLOURS).convert(mode), kind))
    except (OSError, ValueError):
        pytest.skip(f"{kind} has no mode {mode}")
    expected = read_image(str(tmp_path / "x"), order)
    found = read_picture(tmp_path / "x", order)
    assert found.dtype == expected.dtype
    assert (found == expected).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turn", range(0, 10))
def test_exif_orientation_is_applied_as_by_detectron2(kind, turn, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = turn
    (tmp_path / "x").write_bytes(encoded(Image.fromarray(COLOURS), kind, exif=exif))
    found = read_picture(tmp_path / "x")
    assert found.shape == ((20, 12, 3) if 5 <= turn <= 8 else (12, 20, 3))
    assert (
        found == np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x")).convert("RGB"))
    ).all()
    if kind != "TIFF":  # which Pillow itself turns since version 11, and Detectron2 once more
        assert (found == read_image(str(tmp_path / "x"), "RGB")).all()


def test_a_picture_with_damaged_exif_data_is_kept_as_it_lies(tmp_path):
    data = encoded(Image.fromarray(COLOURS), "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    (tmp_path / "x").write_bytes(data)
    assert (read_picture(tmp_path / "x") == COLOURS).all()


DEEP = np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)  # 12 bits of 16
DEEP_IMAGES = {
    "grey.png": DEEP,
    "colours.png": np.stack([DEEP] * 3, 2),
    "grey.tif": DEEP,
    "colours.tif": np.stack([DEEP] * 3, 2),
    "grey.pgm": DEEP,
    "colours.ppm": np.stack([DEEP] * 3, 2),
    "float.tif": DEEP.astype(np.float32),
    "int32.tif": DEEP.astype(np.int32),
}


def refusals(path):
    """What pre-training, fine-tuning and prediction report of a picture."""
    with pytest.raises(DecodeError) as of_pretraining:
        decode(path.read_bytes())
    with pytest.raises(UserError) as of_prediction:
        load_image(path)
    return str(of_pretraining.value), read_header(path), str(of_prediction.value)


@pytest.mark.parametrize("name", DEEP_IMAGES)
def test_more_than_8_bits_are_refused_alike_by_all_three(name, tmp_path):
    path = tmp_path / name
    if "int32" in name:
        Image.fromarray(DEEP_IMAGES[name]).save(path)
    else:
        assert cv2.imwrite(str(path), DEEP_IMAGES[name])
    first, second, third = refusals(path)
    assert "more than 8 bits a channel: convert it to 8 bits" in first
    assert second == first
    assert first in third
    with pytest.raises(RefusedImageError):
        check_picture(path)
    assert is_picture(path)


@pytest.mark.parametrize("bands", ["unspecified", "untagged"])
def test_a_fourth_band_is_refused_alike_by_all_three(bands, tmp_path):
    path = tmp_path / "x.tif"
    four = np.dstack([COLOURS, COLOURS[:, :, 0]])
    if bands == "unspecified":
        Image.fromarray(four).convert("RGBX").save(path)
    else:
        assert cv2.imwrite(str(path), four)
    first, second, third = refusals(path)
    assert "4 bands, one of which is neither colour nor transparency: convert it to RGB" in first
    assert second == first
    assert first in third


def bitmap_of_16_bits():
    """A BMP with 5, 6 and 5 bits for red, green and blue."""
    masks = b"".join(x.to_bytes(4, "little") for x in (0xF800, 0x07E0, 0x001F))
    header = (40).to_bytes(4, "little") + (4).to_bytes(4, "little") * 2 + b"\x01\0\x10\0\x03\0\0\0"
    header += (32).to_bytes(4, "little") + bytes(16) + masks
    size = 14 + len(header)
    return (
        b"BM"
        + (size + 32).to_bytes(4, "little")
        + bytes(4)
        + size.to_bytes(4, "little")
        + (header + b"\x1f\xf8" * 16)
    )


def test_8_bits_and_transparency_are_accepted(tmp_path):
    for mode in ("RGBA", "LA", "CMYK", "P", "1", "YCbCr"):
        assert decode(encoded(Image.fromarray(COLOURS).convert(mode), "TIFF")).shape == (12, 20, 3)
    assert (decode(bitmap_of_16_bits()) == [255, 0, 255]).all()


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 239)
    path = tmp_path / "x.png"
    path.write_bytes(encoded(Image.fromarray(COLOURS), "PNG"))
    first, second, third = refusals(path)
    assert first == second == "20 x 12 pixels exceed the limit of 239"
    assert first in third

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from moco_common.images import DecodeError
from pretrain.data import decoding
from pretrain.data.decoding import decode

HEIGHT, WIDTH = 48, 64
GRADIENT = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
COLOURS = np.stack([GRADIENT, GRADIENT[::-1], np.full_like(GRADIENT, 90)], axis=2)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


JPEG = encode(Image.fromarray(COLOURS), quality=95)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    assert a.dtype == np.uint8
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_a_jpeg_is_decoded_as_pillow_does():
    assert difference(decode(JPEG), np.asarray(Image.open(io.BytesIO(JPEG)))) < 0.5


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(kind):
    assert (decode(encode(Image.fromarray(COLOURS), kind)) == COLOURS).all()


@pytest.mark.parametrize(
    ("image", "kind", "expected", "tolerance"),
    [
        (Image.fromarray(GRADIENT), "JPEG", np.stack([GRADIENT] * 3, 2), 2),
        (Image.fromarray(GRADIENT), "PNG", np.stack([GRADIENT] * 3, 2), 0),
        (Image.fromarray(COLOURS).convert("CMYK"), "JPEG", COLOURS, 6),
        (Image.fromarray(np.dstack([COLOURS, GRADIENT])), "PNG", COLOURS, 0),
        (Image.fromarray(COLOURS).quantize(256), "PNG", COLOURS, 6),
        (Image.fromarray(COLOURS).quantize(256), "GIF", COLOURS, 6),
        (Image.fromarray(COLOURS).convert("LA"), "PNG", None, 0),
        (Image.fromarray(GRADIENT > 99), "PNG", None, 0),
    ],
    ids=["grey", "grey-png", "cmyk", "alpha", "palette", "gif", "grey-alpha", "1-bit"],
)
def test_every_kind_of_pixels_becomes_rgb(image, kind, expected, tolerance):
    if expected is None:
        expected = np.asarray(image.convert("RGB"))
    assert difference(decode(encode(image, kind)), expected) <= tolerance


def test_a_palette_with_transparency_is_decoded_without_a_warning(recwarn):
    data = encode(Image.fromarray(COLOURS).quantize(16), "PNG", transparency=bytes([0, 128]))
    assert decode(data).shape == (HEIGHT, WIDTH, 3)
    assert not recwarn.list


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((9, 9, 3), value, np.uint8)) for value in (40, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data) == 40).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = encode(Image.fromarray(COLOURS), kind, exif=exif)
    assert difference(decode(data), np.rot90(COLOURS, -1)) < 3


@pytest.mark.parametrize("length", [0, 2, 20, 300, len(JPEG) // 2, len(JPEG) - 9])
def test_a_truncated_jpeg_is_an_error(length):
    with pytest.raises(DecodeError):
        decode(JPEG[:length])


@pytest.mark.parametrize("data", [b"no image", b"\xff\xd8\xff" + bytes(50), b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_an_error(data):
    with pytest.raises(DecodeError, match=r"\w+"):
        decode(data)


def test_a_truncated_png_is_an_error():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "PNG")
    with pytest.raises(DecodeError):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("side", [12_000, 30_000, 100_000])
def test_a_png_of_absurd_size_is_refused_before_memory_is_taken(side):
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(DecodeError, match=r"\d"):
        decode(data)


def test_a_jpeg_that_is_too_large_is_decoded_smaller(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", HEIGHT * WIDTH // 4)
    assert decode(JPEG).shape == (HEIGHT // 2, WIDTH // 2, 3)
    monkeypatch.setattr(decoding, "MAX_PIXELS", HEIGHT * WIDTH // 64)
    assert decode(JPEG).shape == (HEIGHT // 8, WIDTH // 8, 3)
    monkeypatch.setattr(decoding, "MAX_PIXELS", HEIGHT * WIDTH // 65)
    with pytest.raises(DecodeError, match="64 x 48 pixels"):
        decode(JPEG)


def test_a_progressive_jpeg_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(DecodeError, match="exceed the limit"):
        decode(encode(Image.fromarray(COLOURS), progressive=True))


@pytest.mark.parametrize(
    ("min_side", "min_area", "height"), [(24, 768, 24), (25, 768, 48), (24, 769, 48), (6, 48, 6)]
)
def test_a_jpeg_shrinks_only_as_far_as_its_crops_allow(min_side, min_area, height):
    assert decode(JPEG, min_side=min_side, min_area=min_area).shape[0] == height

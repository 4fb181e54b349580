"""Files called ``x.jpg`` that are something else, claim more than they hold, or never end."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

Write = Callable[[Path], object]
Case = tuple[str, Write]


def _encoded(suffix: str, size: tuple[int, int] = (48, 64)) -> bytes:
    rng = np.random.default_rng(0)
    return bytes(cv2.imencode(suffix, rng.integers(0, 256, (*size, 3), dtype=np.uint8))[1])


def _chunk(kind: bytes, content: bytes, length: int | None = None) -> bytes:
    size = struct.pack(">I", len(content) if length is None else length)
    return size + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(
    width: int, height: int, data: bytes, depth: int = 8, kind: int = 2, *more: bytes
) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = b"".join(more) + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def _with_size(jpeg: bytes, height: int, width: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _tiff(entries: list[tuple[int, int, int, int]], data: bytes = bytes(64)) -> bytes:
    table = struct.pack("<H", len(entries))
    table += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"II*\x00" + struct.pack("<I", 8) + table + data


_POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n"
    b"(%pipe%touch PROOF) (w) file closefile\nshowpage\n%%EOF\n"
)
_SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>'


def _contents(proof: Path) -> Iterator[tuple[str, bytes]]:
    command = os.fsencode(proof)
    postscript = _POSTSCRIPT.replace(b"PROOF", command)
    yield "PostScript", postscript
    yield (
        "binary EPS",
        b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(postscript)) + bytes(20) + (postscript),
    )
    yield "PDF", b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch/F(touch " + command + b")>>>>endobj\n"
    yield "SVG", _SVG
    yield (
        "ImageMagick's MVG",
        b"push graphic-context\nimage over 0,0 0,0 'ephemeral:" + command + b"'\n",
    )
    yield "a shell script", b"#!/bin/sh\ntouch " + command + b"\n"
    yield "a pickle", b"cos\nsystem\n(Vtouch " + command + b"\ntR."
    yield "XPM", b'/* XPM */\nstatic char *x[] = {\n"64 48 1 1",\n"a c #000000",\n'
    yield "WMF", b"\xd7\xcd\xc6\x9a" + bytes(60)
    yield "FITS", b"SIMPLE  =                    T" + b" " * 2850
    yield "Sun raster", b"\x59\xa6\x6a\x95" + struct.pack(">IIIIIII", 64, 48, 24, 9216, 1, 0, 0)
    yield "PCX", b"\x0a\x05\x01\x08" + struct.pack("<HHHH", 0, 0, 63, 47) + bytes(116)
    yield "TGA", b"\x00\x00\x02" + bytes(9) + struct.pack("<HH", 30_000, 30_000) + b"\x18\x00"
    yield "DDS", b"DDS " + struct.pack("<II", 124, 0x1007) + struct.pack("<II", 1 << 30, 1 << 30)
    yield "PSD", b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3)
    yield "ICNS", b"icns" + struct.pack(">I", 1 << 31) + b"ic10" + struct.pack(">I", 1 << 31)
    yield "BLP", b"BLP2" + struct.pack("<I", 1) + bytes(200)
    yield "HDR", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 30000 +X 30000\n"
    yield "OpenEXR", b"\x76\x2f\x31\x01" + bytes(200)
    yield "JPEG 2000", b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(200)
    yield "HEIC", b"\x00\x00\x00\x18ftypheic" + bytes(200)
    yield "nothing", b""
    yield "one byte", b"\xff"
    yield "zeros", bytes(10_000)
    yield "noise", np.random.default_rng(1).bytes(10_000)
    jpeg, png = _encoded(".jpg"), _encoded(".png")
    for share in (0.01, 0.1, 0.3, 0.5, 0.9, 0.99):
        yield f"JPEG cut at {share:.0%}", jpeg[: int(len(jpeg) * share)]
        yield f"PNG cut at {share:.0%}", png[: int(len(png) * share)]
    for height, width in (
        (65_535, 65_535),
        (0, 64),
        (48, 0),
        (1, 65_535),
        (65_535, 1),
        (9_500, 9_500),
    ):
        yield f"JPEG that claims {width} x {height}", _with_size(jpeg, height, width)
    yield "JPEG without an end", jpeg[:-2]
    yield "JPEG with 200 kB of fill bytes", jpeg[:2] + b"\xff" * 200_000 + jpeg[2:]
    yield "JPEG of empty segments", b"\xff\xd8" + b"\xff\xe1\x00\x02" * 50_000 + jpeg[2:]
    yield "JPEG of a segment of length 0", b"\xff\xd8\xff\xe1\x00\x00" + jpeg[2:]
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + struct.pack("<HHHII", 1, 274, 3, 1 << 31, 99)
    yield (
        "JPEG with a lying EXIF",
        jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + (jpeg[2:]),
    )
    loop = b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + struct.pack("<HHHIII", 1, 34665, 4, 1, 8, 8)
    yield (
        "JPEG with an EXIF that loops",
        jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(loop) + 2) + (loop + jpeg[2:]),
    )
    yield (
        "JPEG of 1,000 scans",
        jpeg[:-2] + jpeg[jpeg.index(b"\xff\xda") : -2] * 1_000 + b"\xff\xd9",
    )
    yield "PNG that claims 2^31 - 1 squared", _png((1 << 31) - 1, (1 << 31) - 1, b"")
    yield "PNG that claims 2^31 - 1 x 1", _png((1 << 31) - 1, 1, b"")
    yield "PNG of 0 x 0", _png(0, 0, b"")
    yield "PNG of 30,000 x 30,000 in a few kB", _png(30_000, 30_000, bytes(20_000_000))
    yield "PNG of 9,000 x 9,000, all there", _png(9_000, 9_000, bytes(27_001 * 9_000))
    yield "PNG of 16 bits", _png(64, 48, bytes((64 * 6 + 1) * 48), 16)
    yield "PNG of an unknown kind", _png(64, 48, b"", 8, 9)
    yield "PNG with more data than pixels", _png(8, 8, bytes(30_000_000))
    text = _chunk(b"zTXt", b"k\x00\x00" + zlib.compress(bytes(60_000_000)))
    yield "PNG with a bomb of text", _png(64, 48, bytes(193 * 48), 8, 2, text)
    profile = _chunk(b"iCCP", b"k\x00\x00" + zlib.compress(bytes(60_000_000)))
    yield "PNG with a bomb of a profile", _png(64, 48, bytes(193 * 48), 8, 2, profile)
    yield (
        "PNG of 20,000 chunks of text",
        _png(64, 48, bytes(193 * 48), 8, 2, *[_chunk(b"tEXt", b"a\x00b")] * 20_000),
    )
    yield "PNG with a chunk of 2^31 bytes", png[:33] + struct.pack(">I", 1 << 31) + b"tEXt"
    yield (
        "GIF of 65,535 x 65,535",
        b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\x00\x00" + (bytes(6) + b","),
    )
    frames = [Image.new("P", (8, 8), i % 256) for i in range(50)]
    with io.BytesIO() as buffer:
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
        yield "GIF of many frames", buffer.getvalue()
    yield (
        "BMP of 2^31 lines",
        b"BM"
        + struct.pack(
            "<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 1 << 20, 1 << 30, 1, 24, 0, 0, 0, 0, 0, 0
        ),
    )
    yield (
        "BMP with negative sizes",
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, -64, -48, 1, 24, 0, 0, 0, 0, 0, 0),
    )
    yield (
        "BMP compressed without end",
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 9_000, 9_000, 1, 8, 1, 0, 0, 0, 0, 0)
        + b"\x00\x00" * 5_000,
    )
    yield "PPM of 10^9 x 10^9", b"P6 1000000000 1000000000 255\n"
    yield "PPM with a number of 100,000 digits", b"P6 " + b"9" * 100_000 + b" 48 255\n"
    yield "PPM of text", b"P3 64 48 255\n" + b"1 " * 100
    yield "PBM of 30,000 x 30,000 in text", b"P1 30000 30000\n" + b"0" * 1_000
    yield "PPM that is a comment", b"P6 #" + b"x" * 1_000_000
    yield "TIFF of 2^31 x 2^31", _tiff([(256, 4, 1, 1 << 31), (257, 4, 1, 1 << 31), (277, 3, 1, 3)])
    yield (
        "TIFF that is its own next page",
        b"II*\x00\x08\x00\x00\x00" + struct.pack("<HHHIII", 1, 256, 4, 1, 64, 8),
    )
    yield "TIFF with 65,535 tags", b"II*\x00\x08\x00\x00\x00\xff\xff" + bytes(1_000)
    yield (
        "TIFF with a tag of 2^32 values",
        _tiff([(256, 4, 1, 64), (257, 4, 1, 48), (273, 4, 0xFFFFFFFF, 8)]),
    )
    yield "BigTIFF", b"II+\x00\x08\x00\x00\x00" + struct.pack("<Q", 1 << 60)
    tags = [(256, 4, 1, 64), (257, 4, 1, 48), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    yield (
        "TIFF of strips beyond its end",
        _tiff([*tags, (273, 4, 1, 1 << 30), (279, 4, 1, 1 << 30)]),
    )
    yield (
        "TIFF of LZW noise",
        _tiff([*tags[:3], (259, 3, 1, 5), (262, 3, 1, 1), (273, 4, 1, 90), (279, 4, 1, 60)]),
    )
    yield (
        "WebP of 16383 x 16383",
        b"RIFF"
        + struct.pack("<I", 30)
        + b"WEBPVP8L"
        + struct.pack("<I", 5)
        + (b"\x2f\xff\xff\xff\x0f"),
    )
    yield "WebP cut", b"RIFF\xff\xff\xff\x7fWEBPVP8 \xff\xff\xff\x7f"
    yield "AVIF cut", b"\x00\x00\x00\x1cftypavif" + bytes(200)
    yield (
        "MPO of many pictures",
        jpeg[:2] + b"\xff\xe2\x00\x10MPF\x00II*\x00\x08\x00\x00\x00\xff\xff" + jpeg[2:],
    )
    yield "a picture of one pixel", _encoded(".png", (1, 1))
    yield "a picture of 1 x 4,000", _encoded(".png", (4_000, 1))


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(_encoded(".jpg"))
        file.truncate(12 << 30)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def cases(proof: Path) -> Iterator[Case]:
    """Writers of a file each."""
    for name, content in _contents(proof):
        yield name, lambda path, content=content: path.write_bytes(content)
    yield "a sparse file of 12 GiB", _sparse
    yield from special_files()


def special_files() -> Iterator[Case]:
    """What is no regular file, or none of one's own."""
    yield "a pipe", _fifo
    for target in (
        "/dev/zero",
        "/dev/random",
        "/dev/stdin",
        "/dev/full",
        "/proc/self/mem",
        "/dev/tty",
    ):
        yield f"a link to {target}", lambda path, target=target: path.symlink_to(target)
    yield "a link to itself", lambda path: path.symlink_to(path)
    yield "a link to nothing", lambda path: path.symlink_to("nothing")
    yield "a folder", lambda path: path.mkdir()
    yield "a link to a folder", lambda path: path.symlink_to("/")

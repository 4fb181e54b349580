"""Opening of picture files: which formats, files and pixels both packages accept.

Left to itself, Pillow opens any of its forty formats whatever a file is called, and starts
Ghostscript for PostScript. Every picture of a user is therefore opened here.
"""

import io
import os
import struct
import traceback
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from moco_common.errors import UserError
from moco_common.files import open_regular, replace_file

MAX_PIXELS = 89_478_485  # Pillow's threshold for a decompression bomb warning
for _plugin in ("Avif", "Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "Tiff", "WebP"):
    with suppress(ImportError):  # an older Pillow has no AVIF
        import_module(f"PIL.{_plugin}ImagePlugin")
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
    if name in Image.OPEN
)
_SHEET = "moco-det contact sheet"  # a note in the files of `save_contact_sheet`
_ORIENTATION = 274  # the EXIF tag, EXIF 2.3, section 4.6.4
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Numbers of TIFF tags (TIFF 6.0), and the number of colours of each photometric interpretation.
_WIDTH, _LENGTH = 256, 257
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLES_PER_PIXEL, _EXTRA_SAMPLES = 258, 262, 277, 338
_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}
_TRANSPARENCY = ((1,), (2,))  # the kinds of extra samples that are transparency


# What Pillow's parsers raise on damaged bytes.
_PARSERS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, AssertionError, RuntimeError, struct.error, zlib.error),
    Image.DecompressionBombError,
)


class DecodeError(ValueError):
    """Raised when a picture cannot be decoded or used; the message gives the reason."""


class RefusedImageError(DecodeError):
    """Raised when a picture is intact, but 8-bit RGB pixels would not show what it holds."""


@contextmanager
def open_picture(
    source: bytes | str | os.PathLike[str] | BinaryIO, *, deep: bool = False
) -> Iterator[Image.Image]:
    """Yield a picture whose header has been read and checked, but not its pixels.

    Args:
        source: an encoded picture, a path, or a binary file that can seek.
        deep: accept more than 8 bits a channel, as label maps may have.

    Raises:
        DecodeError: it is no picture of the `FORMATS`, or its header is damaged.
        RefusedImageError: it has too many pixels, more than 8 bits a channel, or a band that is
            neither colour nor transparency.
        OSError: see `open_regular`.
    """
    if isinstance(source, (bytes, str, os.PathLike)):
        file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
        with file, open_picture(file, deep=deep) as image:
            yield image
        return
    with _parsing():
        image = Image.open(source, formats=FORMATS)
    with image:
        with _parsing():
            _refuse(image, deep)
        yield image


def check_picture(path: str | os.PathLike[str]) -> None:
    """Check that a picture may be opened, for readers that open it themselves.

    Raises:
        DecodeError, OSError: see `open_picture`.
    """
    with open_picture(path):
        pass


def is_picture(source: bytes | str | os.PathLike[str] | BinaryIO) -> bool:
    """Return True if the content is a picture of the `FORMATS`, also one that is refused."""
    try:
        with open_picture(source):
            return True
    except RefusedImageError:
        return True
    except (DecodeError, OSError):
        return False


def to_rgb(image: Image.Image) -> np.ndarray:
    """Decode the pixels of a picture from `open_picture`: uint8 (H, W, 3), RGB.

    Greyscale, palette and CMYK become RGB, transparency is dropped, and the EXIF orientation is
    applied.

    Raises:
        DecodeError: the pixels are damaged.
    """
    with _parsing():
        image.load()  # which turns a TIFF, and removes its tag, since Pillow 11
        turn = _TURNS.get(orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # directly to RGB, Pillow would warn
        return np.array(image.convert("RGB"))


def read_picture(path: str | os.PathLike[str], order: str = "RGB") -> np.ndarray:
    """Read a picture file: uint8 (H, W, 3) with channels in ``order``, "RGB" or "BGR".

    The pixels are those of Detectron2's ``read_image``.

    Raises:
        DecodeError, OSError: see `open_picture` and `to_rgb`.
    """
    with open_picture(path) as image:
        pixels = to_rgb(image)
    return pixels if order == "RGB" else pixels[:, :, ::-1]


def save_contact_sheet(pixels: np.ndarray, path: Path) -> None:
    """Write a contact sheet, uint8 (H, W, 3) RGB, as PNG or JPEG by the suffix; atomically.

    Raises:
        UserError: the file exists and is not a contact sheet.
    """
    if path.exists() and not _is_contact_sheet(path):
        raise UserError(f"{path} is not a contact sheet and is not replaced: choose another name.")
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if path.suffix.lower() == ".png":
        note = PngInfo()
        note.add_text("Software", _SHEET)
        replace_file(path, lambda file: image.save(file, format="PNG", pnginfo=note))
    else:
        replace_file(path, lambda file: image.save(file, "JPEG", quality=88, comment=_SHEET))


def _is_contact_sheet(path: Path) -> bool:
    """Return True for a file of `save_contact_sheet`."""
    try:
        with open_picture(path) as image:
            notes = (image.info.get("comment"), image.info.get("Software"))
    except (OSError, DecodeError):
        return False
    return _SHEET in notes or _SHEET.encode() in notes


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of the pixels as they lie in the file, not turned.

    ``image.size`` of a TIFF is, in recent versions of Pillow, that of the turned image.
    """
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        width, height = tags.get(_WIDTH), tags.get(_LENGTH)
        if isinstance(width, int) and isinstance(height, int):
            return width, height
    return image.size


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or the EXIF data are damaged."""
    try:
        with _parsing():
            value = image.getexif().get(_ORIENTATION, 1)
    except DecodeError:
        return 1
    return value if value in range(1, 9) else 1


@contextmanager
def _parsing() -> Iterator[None]:
    """Turn what Pillow raises on damaged bytes into a `DecodeError`; what is raised elsewhere is a
    bug of this project, and is let through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on sizes and palettes, both handled here
            yield
    except DecodeError:
        raise
    except UnidentifiedImageError:  # its message has a memory address
        raise DecodeError("not an image of a known format, or its header is damaged") from None
    except _PARSERS as error:
        if not _raised_by_pillow(error):
            raise
        raise DecodeError(str(error) or type(error).__name__) from None


def _raised_by_pillow(error: BaseException) -> bool:
    frames = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return any(name.startswith("PIL.") for name in frames)


def _refuse(image: Image.Image, deep: bool) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RefusedImageError(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS}")
    if not deep and _is_deep(image):
        raise RefusedImageError(
            f"image of mode {image.mode}, more than 8 bits a channel: convert it to 8 bits"
        )
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        colours = _COLOURS.get(tags.get(_PHOTOMETRIC), 1)
        more = tags.get(_SAMPLES_PER_PIXEL, 1) - colours
        if more > 0 and (more, tags.get(_EXTRA_SAMPLES)) not in [(1, t) for t in _TRANSPARENCY]:
            raise RefusedImageError(
                f"image of {colours + more} bands, one of which is neither colour nor "
                f"transparency: convert it to RGB"
            )


def _is_deep(image: Image.Image) -> bool:
    """Return True if converting to 8-bit pixels would clip or cut off values."""
    if image.mode.split(";")[0] in ("I", "F"):
        return True
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (1,))  # type: ignore[attr-defined]
        return bool(max(bits) > 8)
    tiles = getattr(image, "tile", ())  # (decoder, extents, offset, its parameters)
    if image.format == "PNG":
        return any(";16" in str(tile[3]) for tile in tiles)
    if image.format == "PPM":
        return any(isinstance(tile[3], tuple) and tile[3][1] > 255 for tile in tiles)
    return False

"""Decoding of encoded images to uint8 RGB pixels."""

import cv2
import numpy as np

from moco_common.images import MAX_PIXELS, DecodeError, open_picture, to_rgb

_FLAGS = {
    1: getattr(cv2, "IMREAD_COLOR_RGB", cv2.IMREAD_COLOR),  # OpenCV >= 4.11: no conversion
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def decode(data: bytes, *, min_side: int | None = None, min_area: int | None = None) -> np.ndarray:
    """Decode an image, or the first frame of an animation.

    Greyscale, palette and CMYK become RGB, transparency is dropped, and the EXIF orientation is
    applied.

    Args:
        data: an encoded file. JPEG is decoded by OpenCV, every other format by Pillow.
        min_side, min_area: if both are given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its
            size, which is cheaper, as long as its short side and its area stay at least this
            large, in pixels.

    Returns:
        uint8 (H, W, 3), RGB. A JPEG above `MAX_PIXELS` is decoded at 1/2, 1/4 or 1/8 of its size.

    Raises:
        DecodeError: the data are empty, truncated, undecodable, or refused by `open_picture`.
    """
    if not data:
        raise DecodeError("the file is empty")
    header = _read_jpeg_header(data)
    if header is None:
        return _decode_with_pillow(data)
    height, width, progressive = header
    reduction = 1
    if min_side is not None and min_area is not None:
        while (
            reduction < 8
            and min(height, width) >= 2 * reduction * min_side
            and height * width >= (2 * reduction) ** 2 * min_area
        ):
            reduction *= 2
    # A progressive JPEG is held in memory as a whole during decoding, a sequential one row by row.
    while height * width > MAX_PIXELS * (1 if progressive else reduction**2):
        if reduction == 8 or progressive:
            raise DecodeError(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS}")
        reduction *= 2
    image = _decode_jpeg(data, reduction)
    # Where OpenCV fails, Pillow either decodes the image or says what is wrong with it.
    return _decode_with_pillow(data) if image is None else image


def _read_jpeg_header(data: bytes) -> tuple[int, int, bool] | None:
    """Return (height, width, progressive) of a complete 8-bit JPEG with one or three channels.

    Return None for anything else, which is left to Pillow: other formats, CMYK, a broken header,
    or a missing end-of-image marker (some versions of OpenCV silently fill a truncated image with
    grey).
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    i = 2
    while i + 10 <= len(data) and data[i] == 0xFF:
        marker = data[i + 1]
        if marker == 0xFF:  # fill byte
            i += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height = int.from_bytes(data[i + 5 : i + 7], "big")
            width = int.from_bytes(data[i + 7 : i + 9], "big")
            usual = data[i + 4] == 8 and data[i + 9] in (1, 3) and height > 0 and width > 0
            whole = data.rfind(b"\xff\xd9", i) > 0
            return (height, width, marker == 0xC2) if usual and whole else None
        else:
            i += 2 + int.from_bytes(data[i + 2 : i + 4], "big")
    return None


def _decode_jpeg(data: bytes, reduction: int) -> np.ndarray | None:
    flags = _FLAGS[reduction]
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    if image is None or flags == getattr(cv2, "IMREAD_COLOR_RGB", None):
        return image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with open_picture(data) as image:
        return to_rgb(image)

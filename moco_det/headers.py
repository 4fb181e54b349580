"""Sizes of image files without decoding them: many, quickly, and what is wrong with each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

EXIF_ORIENTATION = 274  # the tag, EXIF 2.3, section 4.6.4
PNG_EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp")
# Modes of more than 8 bits a channel: conversion to RGB clips them, so what a network would see
# is not the picture.
DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class ImageHeader:
    """Size as stored (pixels) and EXIF orientation (1 to 8) of an image file."""

    width: int
    height: int
    orientation: int = 1

    @property
    def stored(self) -> tuple[int, int]:
        """(width, height) of the pixels as they lie in the file, not turned."""
        return self.width, self.height

    @property
    def shown(self) -> tuple[int, int]:
        """(width, height) once the orientation is applied, as Detectron2 reads the image."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored


def read_header(path: str | os.PathLike[str]) -> ImageHeader | str:
    """Read an image's header without decoding it. Returns what is wrong if it is unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.mode.split(";")[0] in DEEP_MODES:
                    return f"image of mode {image.mode}, more than 8 bits a channel"
                orientation = 1
                # On a PNG without these keys getexif() would decode the whole image to look for
                # a chunk behind the pixels.
                if image.format != "PNG" or any(key in image.info for key in PNG_EXIF_KEYS):
                    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
                if orientation not in range(1, 9):
                    orientation = 1
                return ImageHeader(image.width, image.height, orientation)
    except FileNotFoundError:
        return "image missing"
    except Exception:  # PIL's decoders raise nearly anything on a damaged file
        return "image unreadable"


def read_headers(paths: Sequence[str | os.PathLike[str]]) -> list[ImageHeader | str]:
    """:func:`read_header` of many files, in threads: the waiting is on the disk."""
    chunks = [paths[start : start + 64] for start in range(0, len(paths), 64)]
    with ThreadPoolExecutor(max_workers=16) as pool:
        read = pool.map(lambda chunk: [read_header(path) for path in chunk], chunks)
        return [header for chunk in read for header in chunk]

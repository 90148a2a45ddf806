"""Image files to RGB bytes.

Policy: the stored pixels count. An EXIF orientation is ignored, as COCO's own tools and the authors' loaders do, so a
size in an annotation file is that of the stored pixels; TIFF's orientation tag is part of that format, and applied.
Alpha is dropped, palettes and CMYK become RGB, grey is repeated, of 16-bit samples the high byte is kept, and of
several pictures in a file the first.

JPEG is decoded by libjpeg-turbo through simplejpeg, with the accurate transform and smooth chroma that Pillow uses too,
so both give the same bytes. Unlike Pillow it refuses what the library only warns of: a scan that ends early, codes that
do not exist, bytes left over, restart marks out of order. It cannot notice a damaged scan that still is a valid one,
because JPEG has no check sum; PNG has, and Pillow verifies it. All other formats are Pillow's, of `FORMATS` only.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from core.data.table import Table
from core.errors import UserError
from core.files import open_regular

MAX_PIXELS = 2**27  # 134 million: larger headers are taken for decompression bombs
MAX_JPEG = 2**30  # bytes
MAX_SCANS = 500  # of a JPEG: each costs a pass over all pixels; encoders write about ten
JPEG_START = b"\xff\xd8\xff"
HEADER = 2**16  # bytes of a JPEG in which its size nearly always stands
# What Pillow may read beside JPEG. Others of its formats start programs (EPS) or claim files without any signature.
FORMATS = ("PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")


def read_image(path: Path, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of an image file.

    Args:
        path: JPEG, or one of `FORMATS`.
        size: the (height, width) that the annotation file states; checked in the header, before anything is decoded.

    Raises:
        UserError: missing, not an image, truncated, damaged, too large, or of another size.
    """
    with _opened(path) as file:
        if _is_jpeg(file):
            return _decode_jpeg(path, _content(path, file), size)
        with _pillow(path, file, size) as image:
            return _to_rgb(image)


def check_header(path: Path, size: tuple[int, int] | None = None) -> None:
    """UserError as in `read_image`, as far as the first bytes of the file tell."""
    with _opened(path) as file:
        if _is_jpeg(file):
            _check_jpeg_header(path, file, size)
        else:
            with _pillow(path, file, size):
                pass


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, and one line for whatever goes wrong while it is read."""
    try:
        with open_regular(path) as file:
            yield file
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: the header claims more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not an image; JPEG, {', '.join(FORMATS)} are read") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError ...
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(text.split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from error


def _is_jpeg(file: IO[bytes]) -> bool:
    start = file.read(len(JPEG_START))
    file.seek(0)
    return start == JPEG_START


def _content(path: Path, file: IO[bytes]) -> bytes:
    length = os.fstat(file.fileno()).st_size
    if length > MAX_JPEG:
        raise UserError(f"{path}: has {length:,} bytes, more than {MAX_JPEG:,}")
    return file.read()


def _check_jpeg_header(path: Path, file: IO[bytes], size: tuple[int, int] | None) -> None:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(file.read(HEADER))
    except ValueError:  # profiles and thumbnails before the size may be longer
        file.seek(0)
        height, width, _, _ = simplejpeg.decode_jpeg_header(_content(path, file))
    _check_size(path, (height, width), size)


def _decode_jpeg(path: Path, content: bytes, size: tuple[int, int] | None) -> UInt8[np.ndarray, "h w 3"]:
    if content.count(b"\xff\xda") > MAX_SCANS:
        raise UserError(f"{path}: has more than {MAX_SCANS} scans, which would take very long to decode")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        _check_size(path, (height, width), size)
        if colours in ("CMYK", "YCCK"):
            return _from_cmyk(simplejpeg.decode_jpeg(content, "CMYK", strict=True))
        return simplejpeg.decode_jpeg(content, "RGB", strict=True)
    except ValueError as error:
        raise UserError(f"{path}: damaged JPEG ({error}); restore it, or save it anew if it looks right") from None


def _from_cmyk(inks: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of a CMYK JPEG. Nearly all store 255 for no ink, as Adobe does; Pillow takes all of them so, and so do we."""
    size = (inks.shape[1], inks.shape[0])
    return np.array(Image.frombuffer("CMYK", size, inks, "raw", "CMYK;I", 0, 1).convert("RGB"))


@contextlib.contextmanager
def _pillow(path: Path, file: IO[bytes], size: tuple[int, int] | None) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, where MAX_PIXELS decides, and of odd metadata
        with Image.open(file, formats=FORMATS) as image:
            _check_size(path, (image.height, image.width), size)
            yield image


def _check_size(path: Path, size: tuple[int, int], expected: tuple[int, int] | None) -> None:
    height, width = size
    if height * width > MAX_PIXELS:
        raise UserError(f"{path}: the header claims {width}x{height} pixels, more than {MAX_PIXELS:,}")
    if expected is not None and size != expected:
        raise UserError(
            f"{path}: is {width}x{height} pixels (width x height), but its annotation file says "
            f"{expected[1]}x{expected[0]}"
        )


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255
        grey = (np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


class ImageFolder:
    """Reader of a table whose file names are relative to one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, table: Table, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """RGB pixels of image `index`. UserError as in `read_image`."""
        return read_image(self.folder / table.name(index), (int(table.heights[index]), int(table.widths[index])))

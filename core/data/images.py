"""Image files to RGB bytes.

Policy: the stored pixels count. An EXIF orientation is ignored, as COCO's own tools and the authors' loaders do, so a
size in an annotation file is that of the stored pixels. Alpha is dropped, palettes and CMYK become RGB, grey is
repeated, and of 16-bit samples the high byte is kept.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from core.data.table import Table
from core.errors import UserError

MAX_PIXELS = 2**27  # 134 million: larger headers are taken for decompression bombs


def read_image(path: Path, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of an image file.

    Args:
        path: any format that Pillow reads.
        size: the (height, width) that the annotation file states; checked in the header, before anything is decoded.

    Raises:
        UserError: missing, not an image, truncated, damaged, too large, or of another size.
    """
    with _opened(path, size) as image:
        return _to_rgb(image)


def check_header(path: Path, size: tuple[int, int] | None = None) -> None:
    """UserError as in `read_image`, as far as the first bytes of the file tell."""
    with _opened(path, size):
        pass


@contextlib.contextmanager
def _opened(path: Path, size: tuple[int, int] | None) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            with Image.open(path) as image:
                _check_size(path, (image.height, image.width), size)
                yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: the header claims more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not an image, or of a format that Pillow cannot read") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from error


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
    return np.array(image.convert("RGB"))


class ImageFolder:
    """Reader of a table whose file names are relative to one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, table: Table, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """RGB pixels of image `index`. UserError as in `read_image`."""
        return read_image(self.folder / table.name(index), (int(table.heights[index]), int(table.widths[index])))

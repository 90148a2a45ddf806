"""What the image files of a data set are like, found with one look at each: header, last bytes, pixels if asked for."""

import hashlib
import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from core.data.images import FORMATS, MAX_PIXELS, check_header, read_image
from core.errors import UserError

ORIENTATION = 0x0112  # tag of EXIF; that of TIFF is part of the format, and applied
TAIL = 4096  # bytes at the end of a file in which an end marker must stand, and which tell files apart
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
)


class Probe(NamedTuple):
    """One image file."""

    error: str = ""  # the check that it fails, or empty
    note: str = ""  # why
    height: int = 0  # of the stored pixels
    width: int = 0
    mode: str = ""  # Pillow's, such as RGB
    orientation: int = 1  # of EXIF: 1 is upright, 5 to 8 exchange the sides
    ended: bool = True  # has its format's end marker
    key: int = 0  # files of other keys have other bytes, or other pixels if these were decoded


def probe(path: Path, *, pixels: bool = False) -> Probe:
    """Looks at an image file; an unsound one is described, not raised.

    Args:
        path: the file.
        pixels: decode it; without, that is done only where the end marker is missing or the mode is rare.
    """
    if not path.is_file():
        if path.exists():
            return Probe("image-unreadable", "is no file")
        return Probe("image-missing", "is not there")
    facts, bomb = _facts(path)
    try:
        check_header(path)
    except UserError as error:
        large = bomb or facts.height * facts.width > MAX_PIXELS
        return facts._replace(error="image-too-large" if large else "image-unreadable", note=_reason(path, error))
    if pixels or not facts.ended or facts.mode in ("", "F"):  # no mode: a JPEG that only the decoder takes
        try:
            decoded = read_image(path)
        except UserError as error:
            return facts._replace(error="image-corrupt", note=_reason(path, error))
        if not facts.mode:
            facts = facts._replace(height=len(decoded), width=decoded.shape[1], mode="RGB")
        if pixels:
            content = str(decoded.shape).encode() + decoded.tobytes()
            key = int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")
            facts = facts._replace(key=key)
    return facts


def _facts(path: Path) -> tuple[Probe, bool]:
    """What header and last bytes tell, and whether Pillow takes the file for a decompression bomb."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("JPEG", *FORMATS)) as image:
                ended, key = _end(path, image.format or "")
                return Probe("", "", image.height, image.width, image.mode, _orientation(image), ended, key), False
    except Image.DecompressionBombError:
        return Probe(), True
    except Exception:  # as many kinds as Pillow has readers; `check_header` says what is wrong
        return Probe(), False


def _orientation(image: Image.Image) -> int:
    """EXIF's word on how to turn an image; 1 where there is none or it is none of the eight."""
    content: Any = image.info.get("exif")
    exif = Image.Exif()
    try:
        if isinstance(content, bytes):
            exif.load(content)
        value = exif.get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block turns nothing
        return 1
    return value if value in range(1, 9) else 1


def _end(path: Path, kind: str) -> tuple[bool, int]:
    """Whether the end marker is there, and a key made of size and last bytes."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - TAIL, 0))
        tail = file.read()
    return ENDS.get(kind, b"") in tail, (size << 32 | zlib.crc32(tail)) % 2**62


def _reason(path: Path, error: UserError) -> str:
    return str(error).removeprefix(f"{path}: ")


def file_digest(path: Path) -> bytes:
    """A short hash of all bytes of a file; of its name if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return os.fsencode(path)


def image_files(folder: Path) -> Iterator[Path]:
    """All files below a folder that are called like images, in a fixed order."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(place, name)

"""Image files: every mode becomes RGB, and one line for what cannot be read."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.data.images import check_header, read_image
from core.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (5, 7)), PIXELS, strict=True)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "PA", "CMYK", "I;16"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "PA") else "a.png")
    grey = PIXELS[..., 0]
    if mode == "I;16":  # 16 bits: the high byte counts
        image = Image.fromarray(grey.astype(np.uint16) * 256 + 77)
        expected = np.repeat(grey[..., None], 3, axis=2)
    elif mode == "RGBA":
        image = Image.fromarray(np.concatenate([PIXELS, PIXELS[..., :1]], axis=2))
        expected = PIXELS  # alpha is dropped, not blended
    elif mode == "LA":
        image = Image.fromarray(np.stack([grey, PIXELS[..., 1]], axis=2), "LA")
        expected = np.repeat(grey[..., None], 3, axis=2)
    else:
        image = Image.fromarray(PIXELS).convert("P" if mode == "PA" else mode).convert(mode)
        expected = np.array(image.convert("RGB"))
    image.save(path)
    np.testing.assert_array_equal(read_image(path, (5, 7)), expected, strict=True)


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (5, 7)), PIXELS)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    Image.fromarray(np.tile(PIXELS, (20, 20, 1))).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.tile(PIXELS, (20, 20, 1))).save(tmp_path / "whole.png")
    spoilt = bytearray((tmp_path / "whole.png").read_bytes())
    spoilt[len(spoilt) // 2] ^= 255
    (tmp_path / "spoilt.png").write_bytes(spoilt)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "bomb.png").write_bytes(png_header(100_000, 100_000))
    (tmp_path / "large.png").write_bytes(png_header(12_000, 12_000))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    lines = {
        "truncated.jpg": "truncated",
        "spoilt.png": "cannot be read as an image",
        "text.jpg": "not an image",
        "empty.jpg": "not an image",
        "folder.jpg": "cannot be read",
        "missing.jpg": "no such image file",
        "bomb.png": "the header claims",
        "large.png": "claims 12000x12000 pixels",
        "float.tif": "floating-point",
    }
    for name, line in lines.items():
        with pytest.raises(UserError, match=line) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_size_differs_from_the_annotation(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(8, 5))  # its pixels cannot be decoded: the header is enough
    with pytest.raises(UserError, match=r"a.png: is 8x5 pixels .* says 7x5"):
        read_image(tmp_path / "a.png", (5, 7))
    with pytest.raises(UserError, match="is 8x5"):
        check_header(tmp_path / "a.png", (5, 7))
    check_header(tmp_path / "a.png", (5, 8))

"""Image files: every mode becomes RGB, and one line for what cannot be read."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile

from core.data import images
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
    plain, turned = jpeg(PIXELS), jpeg(PIXELS, exif=exif)
    (tmp_path / "plain.jpg").write_bytes(plain)
    (tmp_path / "turned.jpg").write_bytes(turned)
    assert plain != turned
    np.testing.assert_array_equal(read_image(tmp_path / "turned.jpg", (5, 7)), read_image(tmp_path / "plain.jpg"))


def test_tiff_orientation_is_part_of_the_format(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})  # stored lying, to be turned clockwise
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", (7, 5)), np.rot90(PIXELS, -1))


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options: Any) -> bytes:
    """The bytes of a JPEG file as Pillow writes it."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    """A picture with slopes and an edge."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y > height) * 200], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2, "quality": 30},
        {"subsampling": 2, "progressive": True},
        {"restart_marker_rows": 1},
        {"mode": "L"},
        {"mode": "CMYK"},  # with Adobe's mark, inverted
        {"keep_rgb": True},
    ],
    ids=str,
)
def test_jpeg_pixels_are_pillows(tmp_path: Path, options: dict[str, Any]) -> None:
    for height, width in ((48, 64), (37, 53), (1, 1), (3, 90)):
        (tmp_path / "a.jpg").write_bytes(jpeg(smooth(height, width), **options))
        with Image.open(tmp_path / "a.jpg") as image:
            expected = np.array(image.convert("RGB"))
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", (height, width)), expected, strict=True)


@pytest.mark.parametrize("sampling", ["440", "411"])
def test_rarer_chroma_sampling(tmp_path: Path, sampling: str) -> None:
    (tmp_path / "a.jpg").write_bytes(simplejpeg.encode_jpeg(smooth(37, 53), colorsubsampling=sampling))
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", (37, 53)), np.array(image))


def test_cmyk_jpeg_means_ink(tmp_path: Path) -> None:
    """Adobe stores 255 for no ink: a page without any is white."""
    (tmp_path / "a.jpg").write_bytes(jpeg(np.full((8, 8, 3), 255, np.uint8), mode="CMYK"))
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert simplejpeg.decode_jpeg((tmp_path / "a.jpg").read_bytes(), "CMYK").min() == 255
    assert (read_image(tmp_path / "a.jpg") == 255).all()


def scan_start(content: bytes) -> int:
    """Where the coded pixels of a JPEG begin."""
    mark = content.index(b"\xff\xda")
    return mark + 2 + int.from_bytes(content[mark + 2 : mark + 4], "big")


def spoilt_scans() -> dict[str, bytes]:
    """JPEG files that Pillow reads without a word, and whose pixels are wrong."""
    content = jpeg(smooth(64, 96), quality=90, restart_marker_rows=1)
    start, second = scan_start(content), content.index(b"\xff\xd1")
    middle = (start + len(content)) // 2
    swapped = bytearray(content)
    swapped[second + 1] = 0xD5
    return {
        "codes that do not exist": content[:middle] + b"\xfe" * 40 + content[middle + 40 :],
        "bytes left over": content[:-2] + b"\x12\x34\x56\x78" + content[-2:],
        "bytes missing": content[: second - 30] + content[second:],
        "restart marks out of order": bytes(swapped),
        "an end in the middle": content[:middle] + b"\xff\xd9",
    }


@pytest.mark.parametrize("flaw", spoilt_scans())
def test_corrupt_scans_are_noticed(tmp_path: Path, flaw: str) -> None:
    (tmp_path / "a.jpg").write_bytes(spoilt_scans()[flaw])
    with Image.open(tmp_path / "a.jpg") as image:
        image.load()  # Pillow accepts it
    check_header(tmp_path / "a.jpg", (64, 96))  # the header is sound
    with pytest.raises(UserError, match=r"a\.jpg: damaged JPEG \(\S") as caught:
        read_image(tmp_path / "a.jpg", (64, 96))
    assert "\n" not in str(caught.value)


def test_a_progressive_file_cut_short_is_noticed(tmp_path: Path) -> None:
    content = jpeg(smooth(64, 96), progressive=True)
    (tmp_path / "a.jpg").write_bytes(content[: content.rindex(b"\xff\xda") + 20] + b"\xff\xd9")
    with pytest.raises(UserError, match="damaged JPEG"):
        read_image(tmp_path / "a.jpg")


def test_pillow_is_strict_with_the_other_formats() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_large_header_of_a_jpeg(tmp_path: Path) -> None:
    """A colour profile may come before the size, in parts of 64 KB."""
    (tmp_path / "a.jpg").write_bytes(jpeg(smooth(8, 8), icc_profile=bytes(300_000)))
    check_header(tmp_path / "a.jpg", (8, 8))
    assert read_image(tmp_path / "a.jpg", (8, 8)).shape == (8, 8, 3)
    with pytest.raises(UserError, match="is 8x8 pixels"):
        check_header(tmp_path / "a.jpg", (8, 9))


def test_jpeg_limits_hold_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(jpeg(smooth(8, 8)))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    (tmp_path / "bomb.jpg").write_bytes(content)
    scans = jpeg(smooth(64, 96), progressive=True)
    first = scans.index(b"\xff\xda")
    (tmp_path / "scans.jpg").write_bytes(scans[:first] + scans[first:-2] * 100 + scans[-2:])
    (tmp_path / "long.jpg").write_bytes(scans)
    for name, line in {"bomb.jpg": "claims 60000x60000", "scans.jpg": "more than 500 scans"}.items():
        with pytest.raises(UserError, match=line):
            read_image(tmp_path / name)
    monkeypatch.setattr(images, "MAX_JPEG", 100)
    with pytest.raises(UserError, match="bytes, more than 100"):
        read_image(tmp_path / "long.jpg")


def test_nothing_but_plain_files_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "zero.jpg"):
        for work in (read_image, check_header):
            with pytest.raises(UserError, match=f"{name}: cannot be read as an image .is a device or pipe"):
                work(tmp_path / name)
    Image.fromarray(PIXELS).save(tmp_path / "b.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "b.png")  # as data version control lays them
    np.testing.assert_array_equal(read_image(tmp_path / "link.png"), PIXELS)


def test_formats_that_start_programs_are_not_tried(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg: not an image; JPEG, PNG"):
        read_image(tmp_path / "a.jpg")


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
        "truncated.jpg": "Premature end of JPEG file",
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

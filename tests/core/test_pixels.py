"""Bytes to normalised floats."""

import pytest
import torch

from core.pixels import normalize_pixels


def test_torchvision_pixel_by_hand() -> None:
    images = torch.tensor([124, 57, 161], dtype=torch.uint8).reshape(1, 3, 1, 1)  # red, green, blue
    pixels = normalize_pixels(images, torch.tensor([[1, 1]]), caffe2=False)
    # (124 - 123.675) / 58.395; (57 - 116.28) / 57.12; (161 - 103.53) / 57.375
    torch.testing.assert_close(pixels.flatten(), torch.tensor([0.005566, -1.037815, 1.001656]), atol=1e-6, rtol=0)


def test_caffe2_pixel_by_hand() -> None:
    images = torch.tensor([124, 57, 161], dtype=torch.uint8).reshape(1, 3, 1, 1)
    pixels = normalize_pixels(images, torch.tensor([[1, 1]]), caffe2=True)
    # blue 161 - 102.9801; green 57 - 115.9465; red 124 - 122.7717
    torch.testing.assert_close(pixels.flatten(), torch.tensor([58.0199, -58.9465, 1.2283]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("caffe2", [False, True])
def test_padding_is_exactly_zero_whatever_it_holds(caffe2: bool) -> None:
    images = torch.randint(0, 256, (3, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[8, 10], [5, 10], [7, 1]])
    pixels = normalize_pixels(images, sizes, caffe2)
    for image, (height, width), alone in zip(pixels, sizes.tolist(), images, strict=True):
        crop = normalize_pixels(alone[None, :, :height, :width], torch.tensor([[height, width]]), caffe2)[0]
        assert torch.equal(image[:, :height, :width], crop)
        assert (crop != 0).all()
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()
    assert pixels.dtype == torch.float32

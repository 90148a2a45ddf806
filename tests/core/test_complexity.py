"""Parameters and multiply-adds against counts by hand and published ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from core.complexity import describe, measure, model_complexity
from core.config import PyramidConfig, TrainConfig
from core.layers import DeformConv
from paa.config import PRESETS
from paa.model import PAA
from tests.core.square import SquareConfig


class OneLayer(nn.Module):
    """A layer over the image's float pixels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        result: Tensor = self.layer(images.float())
        return result


def test_convolution_by_hand() -> None:
    # 3 -> 8 channels, 3 x 3, stride 2 on 32 x 64: 16 x 32 cells of 8 * 3 * 9 products each
    size = measure(OneLayer(nn.Conv2d(3, 8, 3, stride=2, padding=1)), (32, 64))
    assert size.multiply_adds == 16 * 32 * 8 * 3 * 9
    assert (size.parameters, size.trainable) == (8 * 3 * 9 + 8, 8 * 3 * 9 + 8)


def test_deformable_convolution_by_hand() -> None:
    # as many products as the plain one, and the offsets' own convolution to 27 channels
    layer = DeformConv(3, 8, bias=False)
    size = measure(OneLayer(layer), (32, 64))
    assert size.multiply_adds == 32 * 64 * (8 + 27) * 3 * 9


def test_frozen_parameters_are_not_trained() -> None:
    layer = nn.Conv2d(3, 8, 1)
    layer.weight.requires_grad_(False)
    assert measure(OneLayer(layer), (32, 32)).trainable == 8


def test_published_numbers() -> None:
    # Spec section 10: MMDetection's ResNet-50 has 32,295,322 parameters, 32,069,978 trained, and 205.2 GFLOPs at
    # 1280 x 800, quoted for ATSS; its tool also counts norms and activations, we only products: 204.5.
    size = model_complexity(PRESETS["r50_1x"], PAA)
    assert (size.parameters, size.trainable) == (32_295_322, 32_069_978)
    assert size.canvas == (800, 1280)
    assert size.multiply_adds / 1e9 == pytest.approx(205.2, rel=0.005)
    line = describe(size)
    assert line.startswith("32,295,322 parameters with 80 classes, 32,069,978 of them trained; 204.5 GFLOPs")
    narrow = replace(PRESETS["r50_1x"], channels=128)
    assert model_complexity(narrow, PAA).multiply_adds < size.multiply_adds


def test_works_without_memory() -> None:
    with torch.device("meta"):
        model = PAA(PRESETS["x152_32x8d_dcn_2x_ms"], 80)
    assert measure(model.eval(), (64, 64)).multiply_adds > 0


def test_the_image_that_is_counted_follows_the_resize_rule() -> None:
    def pixels(config: TrainConfig, classes: int) -> nn.Module:
        return OneLayer(nn.Conv2d(3, classes, 1))

    assert model_complexity(SquareConfig(steps=1, size=384), pixels).canvas == (384, 384)
    assert model_complexity(PyramidConfig(steps=1, short_side=192, long_side=320), pixels).canvas == (192, 320)

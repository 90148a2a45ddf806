"""Batch norm folded into convolutions gives the same maps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from core.backbone import build_backbone
from core.config import PyramidConfig
from core.folding import fold, fold_norms, is_fixed
from core.layers import DeformConv, FrozenBatchNorm

CONFIG = PyramidConfig(steps=1, backbone="resnet18", backbone_weights="none", frozen_stages=0)


def randomise(module: nn.Module) -> None:
    """Statistics and affine parameters as a trained network has them."""
    for norm in module.modules():
        if isinstance(norm, (FrozenBatchNorm, nn.BatchNorm2d)):
            for part in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(part, 0.2, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.3, 3.0)  # type: ignore[arg-type]
        if isinstance(norm, DeformConv):
            nn.init.normal_(norm.offset.weight, 0, 0.02)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, norm="batch"),
        replace(CONFIG, backbone="resnet50", dcn_stages=(3, 5), dcn_groups=2),
        replace(CONFIG, profile="official"),
    ],
)
def test_folded_backbone_gives_the_same_maps(config: PyramidConfig) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(config).eval().to(memory_format=torch.channels_last)
    randomise(backbone)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = backbone(images)
        norms = sum(is_fixed(module) for module in backbone.modules())
        assert fold_norms(backbone) == norms > 0
        found = backbone(images)
    assert not any(is_fixed(module) for module in backbone.modules())
    for map_, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(map_, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    conv = backbone.layer1[0].conv1
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_fold_by_hand() -> None:
    """(3 x + 1 - 2) / sqrt(3 + 1) * 4 + 5 = 6 x + 3."""
    conv, norm = nn.Conv2d(1, 1, 1), FrozenBatchNorm(1, eps=1.0)
    assert conv.bias is not None
    for part, value in (
        *((conv.weight, 3.0), (conv.bias, 1.0), (norm.weight, 4.0), (norm.bias, 5.0)),
        *((norm.running_mean, 2.0), (norm.running_var, 3.0)),
    ):
        nn.init.constant_(part, value)
    fold(conv, norm)
    assert (conv.weight.item(), conv.bias.item()) == (6.0, 3.0)


def test_only_fixed_norms_right_after_a_convolution_are_folded() -> None:
    learning = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    apart = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), FrozenBatchNorm(3))
    assert fold_norms(learning.train()) == fold_norms(apart) == 0
    assert fold_norms(learning.eval()) == 1

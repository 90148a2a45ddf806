"""The pyramid: sizes, the top-down sum, its variants and its start."""

import math

import pytest
import torch
from torch import Tensor, nn

from core.fpn import FPN


def identity_fpn(relu_before_p7: bool = False, p6_from: str = "p5") -> FPN:
    """One channel; laterals copy and every 3x3 copies its middle."""
    fpn = FPN((1, 1, 1), 1, relu_before_p7, p6_from)  # type: ignore[arg-type]
    for name, parameter in fpn.named_parameters():
        nn.init.zeros_(parameter)
        if name.endswith("weight"):
            parameter.data[..., parameter.shape[2] // 2, parameter.shape[3] // 2] = 1
    return fpn


def features(*sizes: tuple[int, int], channels: tuple[int, ...] = (1, 1, 1)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, width, *size, generator=generator) for width, size in zip(channels, sizes, strict=True)]


def test_top_down_by_hand() -> None:
    c3 = torch.zeros(1, 1, 3, 3)
    c4 = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    c5 = torch.full((1, 1, 1, 1), 10.0)
    p3, p4, p5, p6, p7 = identity_fpn()([c3, c4, c5])
    assert p5.item() == 10
    assert p4[0, 0].tolist() == [[11, 12], [13, 14]]
    # nearest from 2 to 3 cells: cell i reads floor(2 i / 3) = 0, 0, 1
    assert p3[0, 0].tolist() == [[11, 11, 12], [11, 11, 12], [13, 13, 14]]
    assert p6.item() == p7.item() == 10


@pytest.mark.parametrize(("height", "width"), [(100, 168), (13, 17), (5, 1), (1, 1)])
def test_sizes_round_up(height: int, width: int) -> None:
    sizes = [(-(-height // step), -(-width // step)) for step in (1, 2, 4)]
    pyramid = identity_fpn()(features(*sizes))
    assert [tuple(maps.shape[2:]) for maps in pyramid] == [
        (-(-height // step), -(-width // step)) for step in (1, 2, 4, 8, 16)
    ]


def test_relu_touches_p7_alone() -> None:
    maps = features((8, 8), (4, 4), (2, 2))
    plain, relu = identity_fpn()(maps), identity_fpn(relu_before_p7=True)(maps)
    for level in range(4):
        assert torch.equal(plain[level], relu[level])
    assert (plain[3] < 0).any()
    assert torch.equal(relu[4], plain[3].clamp(min=0))  # a 1x1 map: P7's middle tap reads P6 alone


def test_p6_from_c5() -> None:
    maps = features((8, 8), (4, 4), (2, 2), channels=(3, 4, 5))
    torch.manual_seed(0)
    fpn = FPN((3, 4, 5), 6, p6_from="c5")
    assert fpn.output[3].in_channels == 5
    pyramid = fpn(maps)
    torch.testing.assert_close(pyramid[3], fpn.output[3](maps[2]))
    torch.testing.assert_close(pyramid[4], fpn.output[4](pyramid[3]))


def test_start() -> None:
    torch.manual_seed(0)
    fpn = FPN((16, 32, 64), 32)
    for module in fpn.modules():
        if isinstance(module, nn.Conv2d):
            bound = math.sqrt(3 / module.weight[0].numel())  # Kaiming-uniform: sqrt(6 / ((1 + a^2) fan_in)), a = 1
            assert 0.97 * bound < module.weight.abs().max() <= bound
            assert module.bias is not None
            assert not module.bias.any()


def test_names() -> None:
    names = {
        f"{part}.{index}.{last}"
        for part, n in (("lateral", 3), ("output", 5))
        for index in range(n)
        for last in ("weight", "bias")
    }
    assert set(FPN((1, 1, 1), 1).state_dict()) == names

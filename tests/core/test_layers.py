"""Layers, each against arithmetic, a loop or a library."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from core.layers import DeformConv, FrozenBatchNorm, Scale, conv_tower, deformable, head_conv


def random_norm(trainable: bool, eps: float) -> FrozenBatchNorm:
    norm = FrozenBatchNorm(4, eps, trainable)
    generator = torch.Generator().manual_seed(0)
    norm.load_state_dict({key: torch.rand(4, generator=generator) + 0.1 for key in norm.state_dict()})
    return norm


def test_frozen_batch_norm_by_hand() -> None:
    norm = FrozenBatchNorm(1, eps=0.0, trainable=False)
    state = {"weight": [2.0], "bias": [0.5], "running_mean": [1.0], "running_var": [4.0]}
    norm.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    # (3 - 1) / sqrt(4) * 2 + 0.5
    assert norm(torch.full((1, 1, 1, 1), 3.0)).item() == 2.5


def test_epsilon_is_added_to_the_variance() -> None:
    norm = FrozenBatchNorm(1, eps=3.0)
    # 2 / sqrt(1 + 3)
    assert norm(torch.full((1, 1, 1, 1), 2.0)).item() == 1.0


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_frozen_batch_norm_equals_torchvision(trainable: bool, eps: float) -> None:
    norm, oracle = random_norm(trainable, eps), FrozenBatchNorm2d(4, eps=eps)
    oracle.load_state_dict(norm.state_dict())
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(norm.train()(x), oracle(x))


def test_statistics_never_move_and_affine_trains() -> None:
    norm = random_norm(trainable=True, eps=1e-5).train()
    before = {key: value.clone() for key, value in norm.named_buffers()}
    norm(torch.randn(8, 4, 6, 6) * 9).square().sum().backward()
    assert set(before) == {"running_mean", "running_var"}
    for key, value in norm.named_buffers():
        assert torch.equal(value, before[key])
    assert norm.weight.grad is not None
    assert norm.weight.grad.abs().sum() > 0


def test_caffe2_batch_norm_has_no_parameters() -> None:
    norm = FrozenBatchNorm(4, eps=0.0, trainable=False)
    assert not list(norm.parameters())
    assert len(norm.state_dict()) == 4


def test_scale_multiplies_and_starts_at_one() -> None:
    scale, x = Scale(), torch.tensor([[2.0, -3.0]])
    assert torch.equal(scale(x), x)
    nn.init.constant_(scale.scale, 0.5)
    assert torch.equal(scale(x), x / 2)


def bilinear(plane: Tensor, y: float, x: float) -> float:
    """Value between pixels; zero outside."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                total += plane[row, column].item() * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def deform_loop(layer: DeformConv, x: Tensor) -> Tensor:
    """Deformable ConvNets v2, Eq. 1, one multiplication at a time."""
    prediction = layer.offset(x)
    width, offset_groups = layer.out_channels, prediction.shape[1] // 27
    result = torch.zeros(len(x), width, *prediction.shape[2:])
    for b, out, i, j in torch.cartesian_prod(*map(torch.arange, result.shape)).tolist():
        conv_group = out // (width // layer.groups)
        for channel in range(layer.weight.shape[1]):
            source = conv_group * layer.weight.shape[1] + channel
            group = source // (layer.in_channels // offset_groups)
            for k in range(9):
                dy, dx = prediction[b, 18 * group + 2 * k : 18 * group + 2 * k + 2, i, j].tolist()
                mask = prediction[b, 18 * offset_groups + 9 * group + k, i, j].sigmoid().item()
                y = i * layer.stride[0] - 1 + k // 3 + dy
                column = j * layer.stride[1] - 1 + k % 3 + dx
                result[b, out, i, j] += (
                    layer.weight[out, channel, k // 3, k % 3] * mask * bilinear(x[b, source], y, column)
                )
    return result


@pytest.mark.parametrize(("stride", "groups", "offset_groups"), [(1, 1, 1), (2, 2, 1), (1, 1, 2), (1, 4, 2)])
@torch.no_grad()
def test_deform_conv_equals_loop(stride: int, groups: int, offset_groups: int) -> None:
    torch.manual_seed(0)
    layer = DeformConv(4, 4, stride=stride, groups=groups, offset_groups=offset_groups)
    nn.init.normal_(layer.offset.weight, std=0.3)
    x = torch.randn(1, 4, 3, 4)
    torch.testing.assert_close(layer(x), deform_loop(layer, x), atol=1e-5, rtol=1e-4)


def test_deform_conv_starts_as_half_the_plain_one() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    twin = deformable(conv, offset_groups=2)
    x = torch.randn(2, 4, 7, 6)
    assert twin.weight is conv.weight
    assert twin.bias is conv.bias
    assert conv.bias is not None
    bias = conv.bias[:, None, None]
    torch.testing.assert_close(twin(x) - bias, (conv(x) - bias) / 2)  # offsets 0, masks sigmoid(0)


def test_deform_conv_offsets_learn_from_zero() -> None:
    layer = DeformConv(2, 2)
    layer(torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert layer.offset.weight.grad is not None
    assert layer.offset.weight.grad[:18].abs().sum() > 0
    assert layer.offset.weight.grad[18:].abs().sum() > 0


def test_deform_conv_under_autocast() -> None:
    layer = DeformConv(2, 2).to(memory_format=torch.channels_last)
    x = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16().to(memory_format=torch.channels_last))  # as the layer before would hand it over
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("offset_groups", [0, 3])
def test_offset_groups_must_divide(offset_groups: int) -> None:
    with pytest.raises(ValueError, match="offset groups must divide the 4 input channels"):
        DeformConv(4, 4, offset_groups=offset_groups)


def test_head_conv_init() -> None:
    conv = head_conv(64, 64)
    assert abs(conv.weight.std().item() - 0.01) < 2e-4  # 36,864 draws: its own deviation is 4e-5
    assert conv.bias is not None
    assert not conv.bias.any()
    assert head_conv(4, 4, bias=False).bias is None


@pytest.mark.parametrize("bias", [False, True])
def test_tower_layers(bias: bool) -> None:
    tower = conv_tower(64, bias, dcn_last=True)
    assert [type(layer) for layer in tower] == [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 3 + [
        DeformConv,
        nn.GroupNorm,
        nn.ReLU,
    ]
    for index in (0, 3, 6, 9):
        assert (tower[index].bias is not None) == bias
    last = tower[9]
    assert isinstance(last, DeformConv)
    bound = 1 / math.sqrt(9 * 64)
    assert last.weight.abs().max() <= bound
    assert last.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert last.bias is None or not last.bias.any()
    assert not last.offset.weight.any()


def test_tower_norm_by_hand() -> None:
    tower = conv_tower(32, bias=False, depth=1)  # 32 groups of one channel each: zero mean, unit variance per channel
    x = torch.randn(2, 32, 5, 4, generator=torch.Generator().manual_seed(0))
    maps = tower[0](x)
    mean, variance = maps.mean(dim=(2, 3), keepdim=True), maps.var(dim=(2, 3), keepdim=True, correction=0)
    expected = ((maps - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(tower(x), expected, atol=1e-5, rtol=1e-4)

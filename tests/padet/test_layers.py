"""FAM: golden check 9, the sources of its offsets, its gradients."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from padet import layers
from padet.config import Fam
from padet.layers import FeatureAlignment, conv_block, sampled_conv, split_deltas

SOURCES = [source for source in get_args(Fam) if source != "none"]


def module(source: Fam, channels: int = 4, anchors: int = 2, detach: bool = False) -> FeatureAlignment:
    torch.manual_seed(0)
    return FeatureAlignment(source, channels, anchors, "batch", detach).eval()


def inputs(channels: int = 4, anchors: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 5, 6, generator=generator), torch.randn(2, 4 * anchors, 5, 6, generator=generator)


@pytest.mark.parametrize("source", SOURCES)
def test_starts_as_a_plain_convolution(source: Fam) -> None:
    # Check 9
    fam, (x, deltas) = module(source), inputs()
    aligned, offsets = fam(x, deltas)
    assert offsets.shape == (2, 18, 5, 6)
    assert not offsets.any()
    torch.testing.assert_close(aligned, fam.norm(F.conv2d(x, fam.conv.weight, padding=1)).relu(), atol=1e-5, rtol=1e-5)


def test_shift_to_the_right_by_hand() -> None:
    # Check 9: c = (dy 0, dx 1), identity at the centre: output[y, x] = input[y, x + 1], last column 0
    fam = module("disentangled")
    fam.norm = nn.Identity()
    assert fam.shift is not None
    assert fam.shift.bias is not None
    with torch.no_grad():
        fam.shift.bias.copy_(torch.tensor([0.0, 1.0]))
        fam.conv.weight.zero_()
        fam.conv.weight[:, :, 1, 1] = torch.eye(4)
    x = inputs()[0].abs()
    aligned, _ = fam(x, inputs()[1])
    torch.testing.assert_close(aligned[..., :-1], x[..., 1:])
    assert not aligned[..., -1].any()


def test_one_shift_for_all_places() -> None:
    # Check 9: c = (7, 9) gives channels 7, 9, 7, 9, ...
    fam = module("disentangled")
    assert fam.shift is not None
    assert fam.shift.bias is not None
    nn.init.constant_(fam.shift.bias[:1], 7.0)
    nn.init.constant_(fam.shift.bias[1:], 9.0)
    offsets = fam.offsets(*inputs())
    assert torch.equal(offsets[0, :, 2, 3], torch.tensor([7.0, 9.0] * 9))


def test_location_and_shape_parts() -> None:
    # channel 4 a + j holds number j of anchor a
    deltas = torch.arange(8.0).view(1, 8, 1, 1)
    locations, shapes = split_deltas(deltas)
    assert locations.flatten().tolist() == [0, 1, 4, 5]
    assert shapes.flatten().tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize(
    ("source", "width", "features", "locations", "shapes"),
    [
        ("implicit", 4, True, False, False),
        ("explicit_l", 4, False, True, False),
        ("explicit_s", 4, False, False, True),
        ("explicit_ls", 8, False, True, True),
        ("disentangled", 4, False, True, True),
    ],
)
def test_what_offsets_come_from(source: Fam, width: int, features: bool, locations: bool, shapes: bool) -> None:
    # Table 1, Fig. 5
    fam, (x, deltas) = module(source), inputs()
    assert fam.offset.in_channels == width
    for parameter in fam.parameters():
        nn.init.normal_(parameter)
    x.requires_grad_(), deltas.requires_grad_()
    fam.offsets(x, deltas).sum().backward()
    assert (x.grad is not None) == features
    moved = [False, False] if deltas.grad is None else [bool(part.any()) for part in split_deltas(deltas.grad)]
    assert moved == [locations, shapes]


def test_entangled_offsets_are_one_convolution_of_both_parts() -> None:
    fam, (x, deltas) = module("explicit_ls"), inputs()
    nn.init.normal_(fam.offset.weight)
    expected = fam.offset(torch.cat(split_deltas(deltas), dim=1))
    torch.testing.assert_close(fam.offsets(x, deltas), expected)


@pytest.mark.parametrize("detach", [False, True])
def test_detached_offsets_give_deltas_no_gradient(detach: bool) -> None:
    # Spec section 3.2
    fam, (x, deltas) = module("disentangled", detach=detach), inputs()
    for parameter in fam.parameters():
        nn.init.normal_(parameter)
    deltas.requires_grad_()
    fam(x, deltas)[0].sum().backward()
    assert (deltas.grad is None) == detach


def test_sampled_in_float32_under_autocast() -> None:
    fam, (x, deltas) = module("disentangled"), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        aligned, _ = fam(x.bfloat16(), deltas.bfloat16())
    plain = fam.norm(F.conv2d(x.bfloat16().float(), fam.conv.weight, padding=1)).relu()
    torch.testing.assert_close(aligned.float(), plain, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 1e9])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 5, 6), (3, 1, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sampling_on_a_cpu_is_torchvisions(
    spread: float, batch: int, height: int, width: int, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64).to(memory_format=memory_format)
    offsets = torch.randn(batch, 18, height, width, generator=generator, dtype=torch.float64) * spread
    offsets[:, ::4] = offsets[:, ::4].round()  # whole cells, and places exactly on the border
    weight = torch.randn(3, 4, 3, 3, generator=generator, dtype=torch.float64).to(memory_format=memory_format)
    torch.testing.assert_close(sampled_conv(x, offsets, weight), deform_conv2d(x, offsets, weight, padding=1))


def test_places_that_are_no_number_give_none() -> None:
    offsets = torch.zeros(1, 18, 5, 6)
    offsets[0, 0, 2, 3] = torch.nan
    y = sampled_conv(inputs()[0][:1], offsets, torch.ones(3, 4, 3, 3))
    assert y.isnan().sum() == 3
    assert y[0, :, 2, 3].isnan().all()


def test_multiply_adds_are_those_of_the_convolution() -> None:
    x, weight = inputs()[0], torch.zeros(3, 4, 3, 3)
    with FlopCounterMode(display=False) as counter:
        sampled_conv(x, torch.zeros(2, 18, 5, 6), weight)
    assert counter.get_total_flops() == 2 * 2 * 5 * 6 * weight.numel()


def test_torchvision_samples_where_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    fam, (x, deltas) = module("disentangled"), inputs()
    for parameter in fam.parameters():
        nn.init.normal_(parameter)
    aligned = fam(x, deltas)[0]
    monkeypatch.setattr(layers, "deform_conv2d", None)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(fam(x, deltas)[0], aligned, atol=1e-4, rtol=1e-4)
    with pytest.raises(TypeError):
        fam(x, deltas)


def test_sampled_in_float32_under_autocast_without_gradients() -> None:
    fam, (x, deltas) = module("disentangled"), inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        aligned, _ = fam(x.bfloat16(), deltas.bfloat16())
    with torch.no_grad():
        plain = fam.norm(F.conv2d(x.bfloat16().float(), fam.conv.weight, padding=1)).relu()
    assert aligned.dtype == torch.bfloat16
    torch.testing.assert_close(aligned, plain.bfloat16(), atol=0.01, rtol=0.01)


def test_blocks_have_no_bias_before_the_norm() -> None:
    conv, norm, _ = conv_block(3, 8, 3, "batch", stride=2)
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is None
    assert conv_block(3, 8, 3, "batch", stride=2)(torch.zeros(2, 3, 7, 7)).shape == (2, 8, 4, 4)
    assert isinstance(norm, nn.BatchNorm2d)
    assert not isinstance(conv_block(3, 8, 1, "frozen")[1], nn.BatchNorm2d)

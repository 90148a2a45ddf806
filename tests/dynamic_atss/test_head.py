"""GFL's, GFLV2's and VFNet's heads: worked numbers, where the star samples, starts, gradients, parameter counts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.boxes import box_iou
from core.geometry import MODERN
from core.layers import DeformConv
from dynamic_atss.config import Config
from dynamic_atss.head import GFLHead, StarConv, VFNetHead, distribution_statistics, star_offsets
from dynamic_atss.losses import class_scores
from dynamic_atss.model import DynamicATSS, Outputs, build_head, expected_distances, predicted_boxes, run_head
from tests.core.detector import count

SHAPES = ((4, 6), (2, 3), (1, 2), (1, 1), (1, 1))
LEVELS = [24, 6, 2, 1, 1]
HOSTS = ["gfl", "gflv2", "vfnet"]


def pyramid(channels: int = 64, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, *shape, generator=generator) for shape in SHAPES]


def head_of(host: str, *zero: str, **options: Any) -> nn.Module:
    """A new head of three classes; the weights of the layers named are 0."""
    torch.manual_seed(0)
    head = build_head(Config(host=host, channels=64, **options), 3)  # type: ignore[arg-type]
    for name in zero:
        nn.init.zeros_(head.get_submodule(name).weight)  # type: ignore[arg-type]
    return head


def run(head: nn.Module, maps: list[Tensor] | None = None) -> Outputs:
    return run_head(head, pyramid() if maps is None else maps, MODERN, 8.0)


# GFL and GFLV2


def test_expected_distances_by_hand() -> None:
    # Check 15: the mean of 0 ... 16 is 8. With logits 2 at bin 3 and 1 at bin 4, Z = e^2 + e + 15 = 25.1073 and the sum
    # is (3 e^2 + 4 e + 136 - 7) / Z = 162.0403 / 25.1073 = 6.453902.
    bins = torch.zeros(2, 68)
    bins[1, 17 + 3], bins[1, 17 + 4] = 2.0, 1.0  # the second side, t
    expected = torch.tensor([[8.0, 8, 8, 8], [8.0, 6.453902, 8, 8]])
    torch.testing.assert_close(expected_distances(bins), expected, rtol=0, atol=1e-5)


def test_distribution_statistics_by_hand() -> None:
    # Checks 15 and 16: e^2 / Z, e / Z, 1 / Z, 1 / Z and the mean of these four; twenty times 1/17 for equal logits.
    bins = torch.zeros(1, 68, 1, 2)
    bins[0, 17 + 3, 0, 1], bins[0, 17 + 4, 0, 1] = 2.0, 1.0
    found = distribution_statistics(bins)[0, :, 0]
    torch.testing.assert_close(found[:, 0], torch.full((20,), 1 / 17))
    top = torch.tensor([0.294299, 0.108266, 0.039829, 0.039829, 0.120556])
    uniform = torch.full((5,), 1 / 17)
    torch.testing.assert_close(found[:, 1], torch.cat([uniform, top, uniform, uniform]), rtol=0, atol=1e-5)


def test_statistics_equal_a_loop_over_sides() -> None:
    bins = torch.randn(2, 68, 3, 4, generator=torch.Generator().manual_seed(0))
    found = distribution_statistics(bins)
    for image, y, x in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        expected: list[float] = []
        for side in range(4):
            shares = bins[image, 17 * side : 17 * side + 17, y, x].softmax(0).tolist()
            best = sorted(shares, reverse=True)[:4]
            expected += [*best, sum(best) / 4]
        assert found[image, :, y, x].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("host", ["gfl", "gflv2"])
def test_distributions_start_with_boxes_of_sixteen_strides(host: str) -> None:
    # Check 18: equal bins mean 8 strides to each side; on P3 a 128 x 128 box around a 64 x 64 anchor, IoU .25.
    outputs = run(head_of(host, "bbox_pred"))
    boxes = predicted_boxes(outputs, Config(host=host))  # type: ignore[arg-type]
    sides = torch.cat([torch.full((size,), 128.0 * 2**level) for level, size in enumerate(LEVELS)])
    torch.testing.assert_close(boxes[..., 2:] - boxes[..., :2], sides[None, :, None].expand(2, -1, 2))
    torch.testing.assert_close(box_iou(boxes, outputs.grid.boxes), torch.full((2, 34), 0.25))


def test_joint_scores_start_at_half_the_prior() -> None:
    # Check 16: .01 * .5; the towers' noise moves it a little.
    exact = class_scores(run(head_of("gflv2", "cls_logits", "quality.2")))
    torch.testing.assert_close(exact, torch.full_like(exact, 0.005))
    torch.testing.assert_close(
        class_scores(run(head_of("gflv2"))).mean().detach(), torch.tensor(0.005), rtol=0.1, atol=0
    )


def test_quality_reaches_the_distributions() -> None:
    head = head_of("gflv2")
    quality = run(head).quality
    assert quality is not None
    quality.sum().backward()
    reached = {name for name, parameter in head.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in reached} == {"box_tower", "bbox_pred", "scales", "quality"}
    assert all(parameter.grad is not None for parameter in head.get_submodule("box_tower").parameters())


def test_gfl_has_no_quality() -> None:
    head = head_of("gfl")
    assert run(head).quality is None
    assert not any("quality" in name for name in head.state_dict())


# VFNet


def test_star_offsets_by_hand() -> None:
    # Check 17: l, t, r, b = 1, 2, 3, 4 cells. Top left tap (-1, -1) must sample (-2, -1): offset (-1, 0), and so on.
    distances = torch.tensor([8.0, 16, 24, 32])[None, :, None, None]
    pairs = [(-1, 0), (-1, 0), (-1, 2), (0, 0), (0, 0), (0, 2), (3, 0), (3, 0), (3, 2)]
    expected = torch.tensor([float(value) for pair in pairs for value in pair])
    torch.testing.assert_close(star_offsets(distances, 8).flatten(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(star_offsets(torch.full((1, 4, 1, 1), 8.0), 8), torch.zeros(1, 18, 1, 1))


def test_a_tenth_of_the_gradient_passes_the_star() -> None:
    distances = torch.rand(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    star_offsets(distances, 8).sum().backward()
    # three taps each sample at -l, -t, r and b cells; one cell is 8 pixels
    expected = 0.1 * torch.tensor([-3.0, -3, 3, 3])[None, :, None, None] / 8
    torch.testing.assert_close(distances.grad, expected.expand(1, 4, 2, 2))


def test_the_star_samples_centre_sides_and_corners() -> None:
    # On maps that hold x and y of their cells, each tap returns where it sampled. Cell (6, 7), sides within the map.
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    maps = torch.stack([x, y])[None]
    left, top, right, bottom = 20.0, 4.0, 36.0, 28.0  # pixels at stride 8
    distances = torch.tensor([left, top, right, bottom])[None, :, None, None].expand(1, 4, 12, 16)
    offsets = star_offsets(distances, 8)
    star, found = StarConv(2), []
    for tap in range(9):
        with torch.no_grad():
            star.weight.zero_()
            star.weight[[0, 1], [0, 1], tap // 3, tap % 3] = 1
            found.append(star(maps, offsets)[0, :, 6, 7].tolist())
    columns, rows = (7 - left / 8, 7.0, 7 + right / 8), (6 - top / 8, 6.0, 6 + bottom / 8)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([[column, row] for row in rows for column in columns]))


def sampled(maps: Tensor, y: float, x: float) -> Tensor:
    """Bilinear interpolation of (C, H, W) maps that are 0 outside."""
    total = torch.zeros(len(maps))
    for row in (int(y // 1), int(y // 1) + 1):
        for column in (int(x // 1), int(x // 1) + 1):
            if 0 <= row < maps.shape[1] and 0 <= column < maps.shape[2]:
                total += maps[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def test_star_convolution_equals_a_loop_over_taps() -> None:
    generator = torch.Generator().manual_seed(0)
    maps, offsets = (torch.randn(1, size, 3, 4, generator=generator) * 1.5 for size in (5, 18))
    torch.manual_seed(0)
    star = StarConv(5)
    with torch.no_grad():
        found = star(maps, offsets)
    for y in range(3):
        for x in range(4):
            expected = torch.zeros(5)
            for tap in range(9):
                dy, dx = offsets[0, 2 * tap : 2 * tap + 2, y, x].tolist()
                value = sampled(maps[0], y + tap // 3 - 1 + dy, x + tap % 3 - 1 + dx)
                expected += star.weight.detach()[:, :, tap // 3, tap % 3] @ value
            torch.testing.assert_close(found[0, :, y, x], expected, rtol=1e-4, atol=1e-6)


def test_star_of_one_cell_is_an_ordinary_convolution() -> None:
    # Check 17: l = t = r = b = 8 at stride 8.
    maps = pyramid()[0]
    star = StarConv(64)
    offsets = star_offsets(torch.full((2, 4, 4, 6), 8.0), 8)
    expected = nn.functional.conv2d(maps, star.weight, padding=1)
    torch.testing.assert_close(star(maps, offsets), expected, rtol=1e-4, atol=1e-5)


def test_star_weights_start_small() -> None:
    torch.manual_seed(0)
    assert StarConv(64).weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_vfnet_starts_with_boxes_of_sixteen_strides() -> None:
    # Check 18: exp(0) * 8 strides to each side, and a refinement of exp(0); on P3 128 x 128 pixels, IoU .25.
    outputs = run(head_of("vfnet", "bbox_pred", "refine_pred"))
    sides = torch.cat([torch.full((size,), 64.0 * 2**level) for level, size in enumerate(LEVELS)])
    expected = sides[None, :, None].expand(2, -1, 4)
    torch.testing.assert_close(outputs.regression, expected)
    torch.testing.assert_close(outputs.refined, expected)
    boxes = predicted_boxes(outputs, Config(host="vfnet"))
    torch.testing.assert_close(box_iou(boxes, outputs.grid.boxes), torch.full((2, 34), 0.25))


def test_refined_boxes_are_the_predicted_ones_unless_told() -> None:
    outputs = run(head_of("vfnet"))
    assert outputs.refined is not None
    points = outputs.grid.points
    for source, distances in (("refined", outputs.refined), ("initial", outputs.regression)):
        boxes = predicted_boxes(outputs, Config(host="vfnet", pred_source=source))  # type: ignore[arg-type]
        low, high = points - distances[..., :2], points + distances[..., 2:]
        torch.testing.assert_close(boxes, torch.cat([low, high], dim=-1))
    assert not torch.equal(outputs.refined, outputs.regression)


@pytest.mark.parametrize(("constant", "reached"), [(True, False), (False, True)])
def test_refined_boxes_reach_the_first_ones_through_the_star_alone(constant: bool, reached: bool) -> None:
    # Where the refinement does not depend on what the star samples, nothing is left: the factor is of a detached box.
    head = head_of("vfnet", *(["refine_pred"] if constant else []))
    nn.init.constant_(head.get_submodule("bbox_pred").bias, -2.0)  # type: ignore[arg-type]  # stars that fit the maps
    refined = run(head).refined
    assert refined is not None
    refined.sum().backward()
    gradient = dict(head.named_parameters())["bbox_pred.weight"].grad
    assert gradient is not None
    assert bool(gradient.any()) == reached


def test_scores_reach_the_first_boxes_through_the_star() -> None:
    head = head_of("vfnet")
    nn.init.constant_(head.get_submodule("bbox_pred").bias, -2.0)  # type: ignore[arg-type]  # stars that fit the maps
    run(head).logits.sum().backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    assert gradients["bbox_pred.weight"] is not None
    assert gradients["bbox_pred.weight"].any()
    assert gradients["refine_pred.weight"] is None
    assert gradients["box_star.weight"] is None


# all


@pytest.mark.parametrize("host", HOSTS)
def test_every_anchor_starts_at_the_prior(host: str) -> None:
    # Check 20: sigmoid(-4.595120) = .01
    outputs = run(head_of(host, "cls_logits"))
    assert outputs.grid.shapes == SHAPES
    torch.testing.assert_close(outputs.logits, torch.full((2, 34, 3), -4.595120), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("host", "name", "part"), [
    ("gfl", "scales", "regression"),
    ("gflv2", "scales", "regression"),
    ("vfnet", "scales", "regression"),
    ("vfnet", "refine_scales", "refined"),
])  # fmt: skip
def test_scales_act_on_their_level_alone(host: str, name: str, part: str) -> None:
    head = head_of(host)
    before = run(head)
    head.load_state_dict({f"{name}.1.scale": torch.tensor(3.0)}, strict=False)
    after = run(head)
    old, new = (getattr(outputs, part).split(LEVELS, dim=1) for outputs in (before, after))
    for level in (0, 2, 3, 4):
        assert torch.equal(new[level], old[level])
    if host != "vfnet":
        torch.testing.assert_close(new[1], 3 * old[1])
    else:  # exp(3 x) = exp(x)^3, relative to 8 strides of 16 pixels, or to the first box
        unit = 128.0 if part == "regression" else before.regression.split(LEVELS, dim=1)[1]
        torch.testing.assert_close(new[1] / unit, (old[1] / unit) ** 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"host": "gfl"}, 5_063_833),
        ({"host": "gflv2"}, 5_065_242),
        ({"host": "vfnet"}, 5_514_850),
        ({"host": "gfl", "dcn_tower": True}, 5_063_833 + 124_470),
        ({"host": "gflv2", "dcn_tower": True}, 5_065_242 + 124_470),
        ({"host": "vfnet", "dcn_tower": True}, 5_514_850 + 124_470),
    ],
)
def test_parameter_counts(options: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        head = build_head(Config(**options), 80)
    assert count(head) == expected  # spec section 7
    towers = [head.get_submodule("cls_tower"), head.get_submodule("box_tower")]
    deformable = [[isinstance(layer, DeformConv) for layer in tower] for tower in towers]  # type: ignore[attr-defined]
    assert all(sum(flags) == flags[-3] == options.get("dcn_tower", False) for flags in deformable)


def test_columns_of_the_authors_gflv2() -> None:
    with torch.device("meta"):
        assert count(GFLHead(256, 81, quality=True)) == 5_067_547  # spec section 7, 81 columns
        assert count(VFNetHead(256, 81)) == 5_514_850 + 256 * 9 + 1


@pytest.mark.parametrize("host", HOSTS)
def test_boxes_are_float32_under_autocast(host: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(head_of(host))
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.regression.dtype == torch.float32
    assert outputs.refined is None or outputs.refined.dtype == torch.float32
    full = run(head_of(host)).regression.detach()
    assert float((outputs.regression.detach() - full).norm() / full.norm()) < 0.02


@pytest.mark.parametrize("host", HOSTS)
def test_channels_last_changes_nothing(host: str) -> None:
    head = head_of(host, dcn_tower=True)
    plain = run(head)
    last = run(
        head.to(memory_format=torch.channels_last),
        [maps.to(memory_format=torch.channels_last) for maps in pyramid()],
    )
    for one, other in zip(plain[:4], last[:4], strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # other kernels, other order of sums


@pytest.mark.parametrize(
    ("host", "profile", "relu"),
    [
        *[("atss", "ours", False), ("atss", "mmdet", False), ("atss", "official", True)],
        *[("gflv2", profile, False) for profile in ("ours", "mmdet", "official")],
        *[("vfnet", profile, True) for profile in ("ours", "mmdet", "official")],
    ],
)
def test_what_the_host_and_the_profile_build(host: str, profile: str, relu: bool) -> None:
    # DESIGN's profiles; spec ruling 14. The authors of GFLV2 and VFNet built on MMDetection's network.
    options: dict[str, Any] = {"host": host, "profile": profile, "backbone": "resnet18", "channels": 64}
    config = Config(**options, backbone_weights="none", frozen_stages=0)
    with torch.device("meta"):
        model = DynamicATSS(config, 3)
    caffe2 = host == "atss" and profile == "official"
    assert model.fpn.relu_before_p7 == relu
    assert model.caffe2_pixels == caffe2
    tower = model.head.get_submodule("cls_tower")
    assert (tower.get_submodule("0").bias is not None) == caffe2

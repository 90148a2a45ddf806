"""T-Head and the parallel head: worked numbers, slow twins, where offsets lead, starts, gradients, half precision."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample
from torchvision.ops import deform_conv2d

from core.anchors import level_anchors
from core.layers import DeformConv
from core.losses import giou_loss
from tood_tal.config import Config
from tood_tal.head import (
    Alignment,
    BoxDecoder,
    ParallelHead,
    TaskDecomposition,
    THead,
    aligned_scores,
    revert_inside_out,
    sample_boundaries,
)
from tood_tal.losses import GIOU_EPS
from tood_tal.model import Outputs, build_head, run_head

SHAPES = ((4, 6), (2, 3), (1, 2), (1, 1), (1, 1))
LEVELS = [24, 6, 2, 1, 1]
HEADS = ["t_head", "parallel", "parallel_tap"]
CELL = (2, 3)  # row and column of the checks' cell (x = 3, y = 2)


def head_of(head: str = "t_head", **options: Any) -> Any:
    """A new head of three classes, 64 channels wide."""
    torch.manual_seed(0)
    return build_head(Config(head=head, channels=64, **options), 3)  # type: ignore[arg-type]


def pyramid(batch: int = 2, channels: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, channels, *shape, generator=generator) for shape in SHAPES]


def run(head: nn.Module, maps: list[Tensor] | None = None) -> Outputs:
    return run_head(head, pyramid() if maps is None else maps, 8.0)


def random_maps(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# anchors and decoding


def test_anchor_by_hand() -> None:
    # Check 1: the centre is the cell's corner, not its middle.
    boxes, points = level_anchors((4, 5), 8)
    index = CELL[0] * 5 + CELL[1]
    assert boxes[index].tolist() == [-8, -16, 56, 48]
    assert points[index].tolist() == [24, 16]


@pytest.mark.parametrize(("value", "scale"), [(0.0, 1.0), (math.log(2), 0.5)])
def test_anchor_free_boxes_by_hand(value: float, scale: float) -> None:
    # Check 2: the scale multiplies the exponential; inside it the sides would be sqrt 2.
    decoder = BoxDecoder(False, 8.0)
    decoder.load_state_dict({"scales.0.scale": torch.tensor(scale)}, strict=False)
    boxes = decoder(torch.full((1, 4, 4, 5), value), 0)
    torch.testing.assert_close(boxes[0, :, *CELL], torch.tensor([2.0, 1, 4, 3]))
    torch.testing.assert_close(8 * boxes[0, :, *CELL], torch.tensor([16.0, 8, 32, 24]))
    if value == 0:  # row by row: every cell has its own place
        y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
        assert torch.equal(boxes[0], torch.stack([x - 1, y - 1, x + 1, y + 1]))


@pytest.mark.parametrize(
    ("values", "scale", "expected"),
    [
        ([0.0, 0, 0, 0], 1.0, [-8.0, -16, 56, 48]),  # the anchor
        ([1.0, 0, 1, -1], 1.0, [-8.684888, -10.199384, 69.484888, 42.199384]),
        ([2.0, 0, 2, -2], 0.5, [-8.684888, -10.199384, 69.484888, 42.199384]),  # the scale multiplies the deltas
    ],
)
def test_anchor_based_boxes_by_hand(values: list[float], scale: float, expected: list[float]) -> None:
    # Check 3
    decoder = BoxDecoder(True, 8.0)
    decoder.load_state_dict({"scales.0.scale": torch.tensor(scale)}, strict=False)
    boxes = decoder(torch.tensor(values)[None, :, None, None].expand(1, 4, 4, 5), 0)
    torch.testing.assert_close(8 * boxes[0, :, *CELL], torch.tensor(expected))


@pytest.mark.parametrize("anchor_based", [False, True])
def test_boxes_scale_with_the_stride(anchor_based: bool) -> None:
    # In strides the levels are alike; anchors that are half as large change only the boxes made from them.
    decoder, values = BoxDecoder(anchor_based, 8.0), random_maps(2, 4, 3, 4)
    for level in range(1, 5):
        torch.testing.assert_close(decoder(values, level), decoder(values, 0))
    small = BoxDecoder(anchor_based, 4.0)(values, 0)
    assert torch.equal(small, decoder(values, 0)) == (not anchor_based)


@pytest.mark.parametrize("anchor_based", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_scales_act_on_their_level_alone(head: str, anchor_based: bool) -> None:
    module = head_of(head, anchor_based=anchor_based)
    before = run(module).boxes.split(LEVELS, dim=1)
    module.load_state_dict({"decoder.scales.1.scale": torch.tensor(3.0)}, strict=False)
    after = run(module).boxes.split(LEVELS, dim=1)
    assert [torch.equal(old, new) for old, new in zip(before, after, strict=True)] == [True, False, True, True, True]


# scores


@pytest.mark.parametrize(
    ("logit", "alignment", "expected"),
    [(-math.log(99), -math.log(99), 0.01), (0.0, 0.0, 0.5), (2.0, -1.0, 0.486706)],
)
def test_aligned_scores_by_hand(logit: float, alignment: float, expected: float) -> None:
    # Check 4
    values = torch.tensor([logit, alignment]).view(2, 1, 1, 1, 1).unbind()
    assert aligned_scores(*values).item() == pytest.approx(expected, abs=1e-6)


def test_gradient_of_aligned_scores_by_hand() -> None:
    # Check 4: .486706 * (1 - sigmoid(2)) / 2 and .486706 * (1 - sigmoid(-1)) / 2; the map M adds up all classes.
    logits, alignment = (torch.full((1, size, 1, 1), value).requires_grad_() for size, value in ((3, 2.0), (1, -1.0)))
    aligned_scores(logits, alignment).sum().backward()
    torch.testing.assert_close(logits.grad, torch.full((1, 3, 1, 1), 0.0290084))
    torch.testing.assert_close(alignment.grad, torch.full((1, 1, 1, 1), 3 * 0.1779053))


@pytest.mark.parametrize(("logit", "alignment"), [(-200.0, -200.0), (-1e4, 0.0), (30.0, -1e4), (-1e30, -1e30)])
def test_scores_that_underflow_are_zero_with_zero_gradients(logit: float, alignment: float) -> None:
    # Check 4: the square root's own gradient would be infinity times zero.
    parts = [torch.full((1, 1, 1, 1), value).requires_grad_() for value in (logit, alignment)]
    score = aligned_scores(*parts)
    score.sum().backward()
    assert [score.item(), *(part.grad.item() for part in parts if part.grad is not None)] == [0, 0, 0]


def test_gradient_of_aligned_scores_against_finite_differences() -> None:
    logits, alignment = (random_maps(2, size, 2, 3, seed=size).double() * 3 for size in (4, 1))
    assert torch.autograd.gradcheck(aligned_scores, (logits.requires_grad_(), alignment.requires_grad_()))
    direct = (logits.sigmoid() * alignment.sigmoid()).sqrt()
    torch.testing.assert_close(aligned_scores(logits, alignment), direct)


# layer attention


def decomposition() -> Any:
    """Layer attention of 32 channels whose norm does nothing."""
    torch.manual_seed(0)
    module: Any = TaskDecomposition(32)
    module.norm = nn.Identity()
    return module


def scaled_features(module: Any, features: Tensor) -> Tensor:
    """Layer attention as it is written: every layer's features times its attention, then the reduction."""
    attention = module.attention(features.mean(dim=(2, 3), keepdim=True))
    layers = features.unflatten(1, (6, -1))
    return module.reduction((layers * attention.unsqueeze(2)).flatten(1, 2)).relu()


def test_layer_attention_by_hand() -> None:
    # Check 5: .5 * 2 * 1 + .1 * 3 * 10 = 4
    module, features = decomposition(), torch.zeros(1, 6 * 32, 2, 2)
    features[:, 0], features[:, 32] = 1.0, 10.0
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.reduction.weight[5, 0], module.reduction.weight[5, 32] = 2.0, 3.0
        module.attention[2].bias[:2] = torch.tensor([0.5, 0.1]).logit()
        found = module(features, features.mean(dim=(2, 3), keepdim=True))
    expected = torch.zeros(1, 32, 2, 2)
    expected[:, 5] = 4.0
    torch.testing.assert_close(found, expected)


def test_layers_count_half_without_attention() -> None:
    # Check 5: sigmoid(0) = .5, no softmax and no residual.
    module, features = decomposition(), random_maps(2, 6 * 32, 3, 4)
    nn.init.zeros_(module.attention[0].weight)
    nn.init.zeros_(module.attention[2].weight)
    found = module(features, features.mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(found, (module.reduction(features) / 2).relu(), rtol=1e-5, atol=1e-5)


def test_scaled_weights_equal_scaled_features() -> None:
    # Check 5: two images with attentions of their own.
    module, features = decomposition(), random_maps(2, 6 * 32, 3, 4)
    for layer in (0, 2):
        nn.init.normal_(module.attention[layer].weight, std=2.0)
    average = features.mean(dim=(2, 3), keepdim=True)
    first, second = module.attention(average).detach()
    assert float((first - second).abs().max()) > 0.1
    found, expected = module(features, average), scaled_features(module, features)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in module.named_parameters():
        ours, theirs = (torch.autograd.grad(out.square().sum(), parameter, retain_graph=True)[0]
                        for out in (found, expected))  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)


# offsets

PLANE = torch.tensor([[10.0, 20, 40], [50, 60, 80]])


@pytest.mark.parametrize(
    ("cell", "offset", "expected"),
    [
        ((0, 0), (0, 0.5), 15),
        ((0, 0), (0.5, 0), 30),
        ((0, 0), (0.25, 0.5), 25),
        ((0, 0), (0, -0.25), 7.5),  # what lies outside counts as 0, without new weights
        ((0, 2), (0, 0.5), 20),
        ((0, 2), (0, 1), 0),
        ((1, 1), (-1, 1), 40),
        ((1, 2), (0.5, 0.5), 20),
    ],
)
@pytest.mark.parametrize("side", range(4))
def test_sampling_by_hand(side: int, cell: tuple[int, int], offset: tuple[float, float], expected: float) -> None:
    # Check 6: (dy, dx) of each side in turn.
    planes, offsets = PLANE.expand(1, 4, 2, 3), torch.zeros(1, 8, 2, 3)
    offsets[0, 2 * side : 2 * side + 2, *cell] = torch.tensor(offset)
    wanted = planes.clone()
    wanted[0, side, *cell] = expected
    torch.testing.assert_close(sample_boundaries(planes, offsets), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channel", "side", "moved"), [(1, 0, (0, 1)), (6, 3, (1, 0)), (0, 0, (1, 0)), (7, 3, (0, 1))])
def test_channels_of_offsets(channel: int, side: int, moved: tuple[int, int]) -> None:
    # Check 6: channel 1 is dx of x1, channel 6 dy of y2; one cell in the map's middle takes its neighbour's value.
    planes, offsets = random_maps(1, 4, 4, 5), torch.zeros(1, 8, 4, 5)
    offsets[:, channel] = 1.0
    found, (dy, dx) = sample_boundaries(planes, offsets), moved
    others = [index for index in range(4) if index != side]
    assert torch.equal(found[:, others], planes[:, others])
    assert torch.equal(found[:, side, : 4 - dy, : 5 - dx], planes[:, side, dy:, dx:])


@pytest.mark.parametrize("shape", [(3, 5), (1, 4), (4, 1), (1, 1)])
def test_zero_offsets_change_nothing(shape: tuple[int, int]) -> None:
    # Check 6: exactly, on any map.
    planes = random_maps(2, 4, *shape, scale=100.0)
    assert torch.equal(sample_boundaries(planes, torch.zeros(2, 8, *shape)), planes)


def loop_over_cells(planes: Tensor, offsets: Tensor) -> Tensor:
    """Bilinear interpolation one cell at a time."""
    batch, sides, height, width = planes.shape
    found = torch.zeros_like(planes)
    for b in range(batch):
        for side in range(sides):
            for row in range(height):
                for column in range(width):
                    y = row + float(offsets[b, 2 * side, row, column])
                    x = column + float(offsets[b, 2 * side + 1, row, column])
                    for i in (math.floor(y), math.floor(y) + 1):
                        for j in (math.floor(x), math.floor(x) + 1):
                            if 0 <= i < height and 0 <= j < width:
                                weight = (1 - abs(y - i)) * (1 - abs(x - j))
                                found[b, side, row, column] += weight * planes[b, side, i, j]
    return found


def by_deformable_convolution(planes: Tensor, offsets: Tensor) -> Tensor:
    """The published form: a 1x1 kernel of ones, four groups."""
    return deform_conv2d(planes, offsets, torch.ones(4, 1, 1, 1))


def by_grid(planes: Tensor, offsets: Tensor) -> Tensor:
    """The form of spec section 1.5, a side at a time."""
    height, width = planes.shape[-2:]
    y, x = torch.arange(height)[:, None] + offsets[:, 0::2], torch.arange(width) + offsets[:, 1::2]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    options: dict[str, Any] = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False}
    return torch.cat([grid_sample(planes[:, side : side + 1], grid[:, side], **options) for side in range(4)], dim=1)


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("shape", [(5, 7), (1, 4), (3, 1), (1, 1)])
def test_sampling_equals_its_twins(shape: tuple[int, int], spread: float) -> None:
    planes = random_maps(2, 4, *shape, seed=1, scale=5.0).requires_grad_()
    offsets = random_maps(2, 8, *shape, seed=2, scale=spread).requires_grad_()
    found = sample_boundaries(planes, offsets)
    torch.testing.assert_close(found, loop_over_cells(planes.detach(), offsets.detach()), rtol=1e-5, atol=1e-5)
    weights = random_maps(*found.shape, seed=3)
    ours = torch.autograd.grad(found, (planes, offsets), weights)
    for twin in (by_deformable_convolution, by_grid):
        other = twin(planes, offsets)
        torch.testing.assert_close(found, other, rtol=1e-5, atol=2e-5)
        theirs = torch.autograd.grad(other, (planes, offsets), weights)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_sampling_at_whole_cells_equals_deformable_convolution() -> None:
    # On the map's rim and beyond: a step of -1 from the first cell is outside, as is one of +1 from the last.
    planes, generator = random_maps(2, 4, 3, 4), torch.Generator().manual_seed(0)
    offsets = torch.randint(-4, 5, (2, 8, 3, 4), generator=generator).float()
    assert torch.equal(sample_boundaries(planes, offsets), by_deformable_convolution(planes, offsets))


def test_gradient_of_sampling_against_finite_differences() -> None:
    planes = random_maps(1, 4, 3, 4).double().requires_grad_()
    offsets = random_maps(1, 8, 3, 4, seed=1, scale=1.5).double().requires_grad_()
    assert torch.autograd.gradcheck(sample_boundaries, (planes, offsets))


@pytest.mark.parametrize("offset", [5.0, 1e10, 2.0**31, 2.0**63, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1)])
def test_offsets_beyond_the_map_give_zero(shape: tuple[int, int], sign: int, offset: float) -> None:
    planes = random_maps(1, 4, *shape).requires_grad_()
    offsets = torch.full((1, 8, *shape), sign * offset).requires_grad_()
    found = sample_boundaries(planes, offsets)
    assert torch.equal(found, torch.zeros_like(planes))
    if math.isfinite(offset):
        for gradient in torch.autograd.grad(found.sum(), (planes, offsets)):
            assert not gradient.any()


def test_a_broken_offset_spoils_its_own_side_alone() -> None:
    planes, offsets = random_maps(1, 4, 3, 4), random_maps(1, 8, 3, 4, seed=1)
    expected = sample_boundaries(planes, offsets)
    offsets[0, 4, 1, 2] = torch.nan
    found = sample_boundaries(planes, offsets)
    expected[0, 2, 1, 2] = 0
    assert torch.equal(found, expected)


def test_boxes_inside_out_by_hand() -> None:
    # Check 7: all four sides go back; equal sides are not inside out.
    before = torch.tensor([1.0, 1, 3, 3]).view(1, 4, 1, 1).expand(1, 4, 1, 4)
    moved = torch.tensor([[3.5, 1, 3, 3], [2.0, 1, 3, 3], [1.5, 4, 3, 3], [3.0, 1, 3, 1]]).T.reshape(1, 4, 1, 4)
    expected = torch.tensor([[1.0, 1, 3, 3], [2.0, 1, 3, 3], [1.0, 1, 3, 3], [3.0, 1, 3, 1]])
    before, moved = before.clone().requires_grad_(), moved.clone().requires_grad_()
    found = revert_inside_out(moved, before)
    assert torch.equal(found[0, :, 0].T, expected)
    gradients = torch.autograd.grad(found.sum(), (moved, before))  # follow the branch that is taken
    taken = torch.tensor([0.0, 1, 0, 1]).expand(1, 4, 1, 4)
    assert torch.equal(gradients[0], taken)
    assert torch.equal(gradients[1], 1 - taken)


@pytest.mark.parametrize("revert", [False, True])
def test_the_profile_decides_about_boxes_inside_out(revert: bool) -> None:
    head = head_of(profile="ours" if revert else "official")
    with torch.no_grad():
        head.alignment.offset[2].bias.fill_(0)
        head.alignment.offset[2].bias[1] = 3.0  # x1 comes from three cells to the right
    boxes = run(head).boxes
    assert bool((boxes[..., 0] > boxes[..., 2]).any()) != revert


@pytest.mark.parametrize(
    ("box", "target", "expected"),
    [
        ([2.0, 1, 4, 3], [2.0, 1, 5, 3], 0.333333),
        ([0.0, 0, 1, 1], [2.0, 0, 3, 1], 1.333333),
        ([6.0, 5, 2, 1], [0.0, 0, 1, 1], 1.5),  # -6.5 if two negative sides made an area
        ([4.0, 1, 2, 3], [2.0, 1, 4, 3], 1.0),
    ],
)
def test_box_loss_by_hand(box: list[float], target: list[float], expected: float) -> None:
    # Check 8
    found = giou_loss(torch.tensor([box]), torch.tensor([target]), GIOU_EPS, floor=True)
    assert found.item() == pytest.approx(expected, abs=1e-5)


# the start


@pytest.mark.parametrize("head", ["t_head", "parallel_tap"])
def test_start_with_biases_alone(head: str) -> None:
    # Check 21: sqrt(.01 * .01), and one cell to each side.
    module = head_of(head)
    for name, parameter in module.named_parameters():
        if name.endswith("weight") and parameter.dim() > 1:
            nn.init.zeros_(parameter)
    outputs = run(module)
    torch.testing.assert_close(outputs.scores, torch.full((2, 34, 3), 0.01))
    strides = torch.cat([torch.full((size, 1), 8.0 * 2**level) for level, size in enumerate(LEVELS)])
    cells = outputs.grid.points / strides
    assert torch.equal(outputs.boxes, torch.cat([cells - 1, cells + 1], dim=-1).expand(2, -1, -1))


def test_start_of_the_parallel_head() -> None:
    module = head_of("parallel")
    nn.init.zeros_(module.cls_logits.weight)
    outputs = run(module)
    assert outputs.logits is not None
    torch.testing.assert_close(outputs.logits, torch.full((2, 34, 3), -4.595120), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.scores, torch.full((2, 34, 3), 0.01))


def test_start_of_every_layer() -> None:
    # Spec section 1.6
    torch.manual_seed(0)
    head = build_head(Config(dcn_tower=True), 80)
    small, prior = ("attention.", "alignment.offset."), ("cls_logits.bias", "alignment.probability.2.bias")
    for name, parameter in head.named_parameters():
        if "scale" in name:
            assert parameter.item() == 1
        elif name in prior:
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, -4.595120))
        elif parameter.dim() == 1 and ("norm" in name or re.match(r"interactive\.\d\.1\.", name)):
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias") or re.match(r"interactive\.\d\.0\.offset\.", name):
            assert not parameter.any()
        else:
            std = 0.001 if any(part in name for part in small) else 0.01
            error = 5 / math.sqrt(2 * parameter.numel())  # five standard errors
            assert parameter.std().item() == pytest.approx(std, rel=error), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


# how heads are put together


@pytest.mark.parametrize("dcn", [False, True])
def test_the_first_two_interactive_layers_deform(dcn: bool) -> None:
    head = head_of(dcn_tower=dcn)
    convs = [layer[0] for layer in head.interactive]
    assert [isinstance(conv, DeformConv) for conv in convs] == [dcn, dcn, False, False, False, False]
    assert [conv.offset.out_channels for conv in convs if isinstance(conv, DeformConv)] == [27 * 4] * (2 * dcn)
    assert all(conv.bias is None for conv in convs)
    assert run(head).scores.isfinite().all()


@pytest.mark.parametrize("head", ["parallel", "parallel_tap"])
def test_the_last_layers_of_the_towers_deform(head: str) -> None:
    module = head_of(head, dcn_tower=True)
    for tower in (module.cls_tower, module.box_tower):
        assert [isinstance(layer, DeformConv) for layer in tower[::3]] == [False, False, False, True]


def test_every_parameter_gets_a_gradient() -> None:
    module = head_of()
    outputs = run(module)
    (outputs.scores.square().sum() + outputs.boxes.square().sum()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_t_head_equals_its_equations_level_by_level() -> None:
    # Section 3.1 with features scaled by their attention and boundaries sampled cell by cell.
    head = head_of()
    nn.init.normal_(head.alignment.offset[2].weight, std=0.3)
    found = run(head)
    for level, feature in enumerate(pyramid()):
        layers = [feature]
        for layer in head.interactive:
            layers.append(layer(layers[-1].clone()))
        stacked = torch.cat(layers[1:], dim=1)
        tasks = []
        for task in (head.cls_decomposition, head.box_decomposition):
            attention = task.attention(stacked.mean(dim=(2, 3), keepdim=True)).repeat_interleave(64, dim=1)
            tasks.append(task.norm(task.reduction(stacked * attention)).relu())
        logits, distances = head.cls_logits(tasks[0]), head.bbox_pred(tasks[1]).exp()
        y, x = torch.meshgrid(*(torch.arange(float(side)) for side in SHAPES[level]), indexing="ij")
        boxes = torch.stack([x, y, x, y]) + distances * torch.tensor([-1.0, -1, 1, 1])[:, None, None]
        moved = loop_over_cells(boxes, head.alignment.offset(stacked))
        wrong = (moved[:, 0] > moved[:, 2]) | (moved[:, 1] > moved[:, 3])
        moved = torch.where(wrong[:, None], boxes, moved)
        scores = (logits.sigmoid() * head.alignment.probability(stacked).sigmoid()).sqrt()
        for whole, maps in ((found.scores, scores), (found.boxes, moved)):
            part = whole.split(LEVELS, dim=1)[level]
            torch.testing.assert_close(part, maps.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_what_each_head_says(head: str) -> None:
    outputs = run(head_of(head))
    assert outputs.grid.shapes == SHAPES
    assert (outputs.scores.shape, outputs.boxes.shape) == ((2, 34, 3), (2, 34, 4))
    assert (outputs.logits is None) == (head != "parallel")
    assert outputs.quality is None
    if outputs.logits is not None:
        torch.testing.assert_close(outputs.scores, outputs.logits.sigmoid())


def test_centerness_of_plain_atss() -> None:
    outputs = run(head_of("parallel", quality="centerness", atss_share=1.0))
    assert outputs.quality is not None
    assert outputs.quality.shape == (2, 34)


def test_tap_reads_both_towers() -> None:
    module = head_of("parallel_tap")
    assert isinstance(module, ParallelHead)
    assert isinstance(module.alignment, Alignment)
    seen: list[Tensor] = []
    for tower in (module.cls_tower, module.box_tower):
        tower.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    inputs: list[Tensor] = []
    module.alignment.register_forward_hook(lambda _, arguments, __: inputs.append(arguments[0]))
    run(module)
    for level in range(5):
        assert torch.equal(inputs[level], torch.cat(seen[2 * level : 2 * level + 2], dim=1))


@pytest.mark.parametrize("head", HEADS)
def test_channels_last_changes_nothing(head: str) -> None:
    module = head_of(head, dcn_tower=True)
    plain = run(module)
    last = run(
        module.to(memory_format=torch.channels_last),
        [maps.to(memory_format=torch.channels_last) for maps in pyramid()],
    )
    torch.testing.assert_close(plain[:2], last[:2], rtol=1e-4, atol=1e-4)  # other kernels, other order of sums


# half precision


@pytest.mark.parametrize("anchor_based", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_autocast_computes_scores_and_boxes_in_float32(head: str, anchor_based: bool) -> None:
    # Only convolutions may be halved: what is made of their outputs equals the same in float32.
    module = head_of(head, anchor_based=anchor_based)
    seen: dict[str, list[Tensor]] = {}
    if module.alignment is not None:  # offsets that leave their cells
        nn.init.normal_(module.alignment.offset[2].weight, std=0.3)

    def keep(name: str) -> Any:
        return lambda *arguments: seen.setdefault(name, []).append(arguments[-1])

    parts = {"logits": module.cls_logits, "regression": module.bbox_pred}
    parts |= {} if module.alignment is None else vars_of(module.alignment)
    for name, part in parts.items():
        part.register_forward_hook(keep(name))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = run(module)
    assert {maps.dtype for found in seen.values() for maps in found} == {torch.bfloat16}
    assert outputs.scores.dtype == outputs.boxes.dtype == torch.float32
    scores, boxes = [], []
    with torch.no_grad():
        for level in range(5):
            maps = {name: found[level].float() for name, found in seen.items()}
            box = module.decoder(maps["regression"], level)
            if module.alignment is None:
                score = maps["logits"].sigmoid()
            else:
                score = aligned_scores(maps["logits"], maps["probability"])
                box = revert_inside_out(sample_boundaries(box, maps["offset"]), box)
            scores.append(score.flatten(2).transpose(1, 2))
            boxes.append(box.flatten(2).transpose(1, 2))
    torch.testing.assert_close(outputs.scores, torch.cat(scores, dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs.boxes, torch.cat(boxes, dim=1), rtol=1e-6, atol=1e-6)


def vars_of(alignment: Alignment) -> dict[str, nn.Module]:
    """The two predictors of an alignment."""
    return {"probability": alignment.probability, "offset": alignment.offset}


def test_autocast_moves_the_outputs_little() -> None:
    module = head_of()
    full = run(module)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(module)
    assert isinstance(module, THead)
    for name in ("scores", "boxes"):
        one, other = getattr(full, name).detach(), getattr(half, name).detach()
        assert float((one - other).norm() / one.norm()) < 0.02

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor

from core.losses import (
    centerness_target,
    giou_loss,
    iou_loss,
    one_hot_labels,
    sigmoid_focal_loss,
    summed_focal_loss,
)
from core.types import BACKGROUND, IGNORED
from tests.conftest import golden_arrays
from tests.core.operators import Recorder


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 100
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * 60], dim=-1)


# labels


def test_one_hot_by_hand() -> None:
    expected = [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert one_hot_labels(torch.tensor([2, 0, BACKGROUND, IGNORED]), 3).tolist() == expected


def test_one_hot_of_nothing() -> None:
    assert one_hot_labels(torch.zeros(2, 0, dtype=torch.long), 3).shape == (2, 0, 3)


# focal loss


def test_focal_by_hand() -> None:
    # spec PAA section 13, check 7. p = 0.5: 0.25 * 0.25 * ln 2 and 0.75 * 0.25 * ln 2
    # p = 0.01: 0.25 * 0.99^2 * ln 100 and 0.75 * 0.01^2 * -ln 0.99
    prior = -math.log(99)
    values = sigmoid_focal_loss(torch.tensor([0, 0, prior, prior]), torch.tensor([1.0, 0, 1, 0]))
    torch.testing.assert_close(values, torch.tensor([0.0433217, 0.1299651, 1.1283818, 7.53775e-7]), rtol=2e-5, atol=0)


def test_focal_of_an_untrained_network() -> None:
    # spec PAA section 13, check 7: 22400 * 80 negatives at p = 0.01
    logits = torch.full((22400, 80), -math.log(99))
    assert sigmoid_focal_loss(logits, torch.zeros(22400, 80)).sum().item() == pytest.approx(1.350765, rel=1e-4)


def test_focal_options_by_hand() -> None:
    # gamma 0 and alpha 0.5 leave half the cross entropy
    logits, targets = torch.tensor([1.5, -2.0, 0.3]), torch.tensor([1.0, 1, 0])
    half = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") / 2
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, alpha=0.5, gamma=0.0), half)


def test_focal_against_a_loop_in_float64() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double() * 3
    targets = one_hot_labels(torch.tensor([0, 4, -1, 2, -1, 1]), 5)
    values = sigmoid_focal_loss(logits, targets)
    assert values.dtype == torch.float64
    for value, logit, target in zip(
        values.flatten().tolist(), logits.flatten().tolist(), targets.flatten(), strict=True
    ):
        p = 1 / (1 + math.exp(-logit))
        expected = -0.25 * (1 - p) ** 2 * math.log(p) if target else -0.75 * p**2 * math.log(1 - p)
        assert value == pytest.approx(expected, rel=1e-9)


def test_focal_is_finite_for_any_logit() -> None:
    logits = torch.tensor([-1e4, -100, -20, 0, 20, 100, 1e4]).repeat(2).requires_grad_()
    values = sigmoid_focal_loss(logits, torch.tensor([0.0, 1]).repeat_interleave(7))
    values.sum().backward()
    assert values.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert values[6].item() == pytest.approx(7500)  # 0.75 * -ln(1 - sigmoid(1e4)) = 0.75 * 1e4
    assert values[7].item() == pytest.approx(2500)


# box losses


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_summed_focal_equals_the_sum_over_classes(gamma: float) -> None:
    logits = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 8
    labels = torch.tensor([-2, -1, 0, 1, 2, 3, 4]).expand(3, 7)
    once, twice = (logits.clone().requires_grad_() for _ in range(2))
    values = summed_focal_loss(once, labels, 0.3, gamma)
    expected = sigmoid_focal_loss(twice, one_hot_labels(labels, 5), 0.3, gamma).sum(dim=-1)
    torch.testing.assert_close(values, expected)
    values.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(once.grad, twice.grad)


def test_summed_focal_is_finite_for_any_logit() -> None:
    logits = torch.tensor([-1e30, -200.0, 0, 200, 1e30]).repeat(3, 1).requires_grad_()
    values = summed_focal_loss(logits, torch.tensor([-1, 0, 4]))
    assert summed_focal_loss(logits[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)
    values.sum().backward()
    assert logits.grad is not None
    assert values.isfinite().all()
    assert logits.grad.isfinite().all()


def test_giou_by_hand() -> None:
    # spec PAA section 13, check 4: I 25, U 175, E 225; 25/175 - 50/225 = -0.0793651
    a, b = boxes((0, 0, 10, 10)), boxes((5, 5, 15, 15))
    torch.testing.assert_close(giou_loss(a, b), torch.tensor([1.0793651]))
    torch.testing.assert_close(iou_loss(a, b), torch.tensor([1 - 0.1428571]))


def test_giou_of_an_anchor_by_hand() -> None:
    # spec PAA section 13, check 2, legacy anchor with plain sides: I = U's inner part 31^2, U = E = 63^2
    loss = giou_loss(boxes((-27.5, -27.5, 35.5, 35.5)), boxes((0, 0, 31, 31)))
    torch.testing.assert_close(loss, torch.tensor([0.757874]), rtol=0, atol=1e-6)


def test_giou_far_apart_by_hand() -> None:
    # I 0, U 2, E 10 * 1: 1 - (0 - 8 / 10)
    torch.testing.assert_close(giou_loss(boxes((0, 0, 1, 1)), boxes((9, 0, 10, 1))), torch.tensor([1.8]))


def test_anchor_score_of_an_untrained_network() -> None:
    # spec PAA section 13, check 8: 1.1283818 + 79 * 7.53775e-7 + 0.757874
    focal = sigmoid_focal_loss(torch.full((80,), -math.log(99)), one_hot_labels(torch.tensor(3), 80)).sum()
    giou = giou_loss(boxes((-27.5, -27.5, 35.5, 35.5)), boxes((0, 0, 31, 31)))[0]
    assert (focal + giou).item() == pytest.approx(1.886315, abs=2e-6)
    assert (focal + 1.3 * giou).item() == pytest.approx(2.113677, abs=2e-6)


def test_weighted_terms_by_hand() -> None:
    # spec PAA section 13, check 9: (.5 * .6 + .8 * .25) / 1.3 * 1.3; cross entropies
    u, loss = torch.tensor([0.5, 0.8]), torch.tensor([0.6, 0.25])
    assert (1.3 * (u * loss).sum() / u.sum()).item() == pytest.approx(0.5)
    entropy = F.binary_cross_entropy_with_logits
    assert 0.5 * entropy(torch.zeros(2), u).item() == pytest.approx(0.346574, abs=1e-6)
    assert entropy(torch.tensor([1.0]), torch.tensor([0.8])).item() == pytest.approx(0.513262, abs=1e-6)


def test_giou_against_a_loop() -> None:
    pred, target = random_boxes(40, 0).double(), random_boxes(40, 1).double()
    for loss, iou, p, t in zip(
        giou_loss(pred, target), iou_loss(pred, target), pred.tolist(), target.tolist(), strict=True
    ):
        width = max(0.0, min(p[2], t[2]) - max(p[0], t[0]))
        height = max(0.0, min(p[3], t[3]) - max(p[1], t[1]))
        union = (p[2] - p[0]) * (p[3] - p[1]) + (t[2] - t[0]) * (t[3] - t[1]) - width * height + 1e-7
        enclosing = (max(p[2], t[2]) - min(p[0], t[0])) * (max(p[3], t[3]) - min(p[1], t[1])) + 1e-7
        giou = width * height / union - (enclosing - union) / enclosing
        assert loss.item() == pytest.approx(1 - giou, rel=1e-12)
        assert iou.item() == pytest.approx(1 - width * height / union, rel=1e-12)


def test_giou_against_torchvision() -> None:
    pred, target = random_boxes(200, 2), random_boxes(200, 3)
    expected = torchvision.ops.generalized_box_iou_loss(pred, target)
    torch.testing.assert_close(giou_loss(pred, target), expected)


def test_giou_raises_corners_of_an_inverted_prediction() -> None:
    # (8, 8, 2, 12) becomes (8, 8, 8, 12) without area: I 0, U 100, E 10 * 12
    loss = giou_loss(boxes((8, 8, 2, 12)), boxes((0, 0, 10, 10)))
    torch.testing.assert_close(loss, torch.tensor([1 + 20 / 120]))
    assert iou_loss(boxes((8, 8, 2, 12)), boxes((0, 0, 10, 10))).item() == 1


def test_giou_floor_or_sum_of_small_areas() -> None:
    point = boxes((5, 5, 5, 5))
    speck = boxes((0, 0, 1e-3, 1e-4))  # 1e-7 square pixels
    # added: I / (1e-7 + 1e-7) = .5, E as U; floored at 1e-6: I / 1e-6 = .1; without any area: 0 - 0 either way
    torch.testing.assert_close(giou_loss(speck, speck), torch.tensor([0.5]))
    torch.testing.assert_close(giou_loss(speck, speck, eps=1e-6, floor=True), torch.tensor([0.9]))
    assert giou_loss(point, point).item() == giou_loss(point, point, eps=1e-6, floor=True).item() == 1


EXTREME = boxes(
    (0, 0, 10, 10),
    (5, 5, 5, 5),
    (5, 5, 5, 9),
    (0, 0, 1e-20, 1e-20),
    (0, 0, 1e-4, 1e-4),
    (10, 10, 0, 0),
    (10, 0, 0, 10),
    (-1e6, -1e6, 1e6, 1e6),
    (-1e18, -1e18, 1e18, 1e18),
    (1e18, 1e18, -1e18, -1e18),
    (1e17, 1e17, 1e18, 1e18),
)


@pytest.mark.parametrize("options", [{}, {"eps": 1e-6, "floor": True}])
def test_giou_is_finite_at_extremes(options: dict[str, Any]) -> None:
    targets = EXTREME[(EXTREME[:, 2:] >= EXTREME[:, :2]).all(dim=1)]
    pred = EXTREME[:, None].repeat(1, len(targets), 1).requires_grad_()
    losses = giou_loss(pred, targets[None], **options)
    (gradient,) = torch.autograd.grad(losses.sum(), pred)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert losses.min() >= 0
    assert losses.max() <= 2


def test_iou_loss_is_finite_at_extremes() -> None:
    targets = EXTREME[(EXTREME[:, 2:] >= EXTREME[:, :2]).all(dim=1)]
    pred = EXTREME[:, None].repeat(1, len(targets), 1).requires_grad_()
    losses = iou_loss(pred, targets[None])
    (gradient,) = torch.autograd.grad(losses.sum(), pred)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


def test_losses_of_nothing() -> None:
    assert giou_loss(boxes(), boxes()).shape == (0,)
    assert iou_loss(boxes(), boxes()).shape == (0,)
    assert sigmoid_focal_loss(torch.zeros(2, 0, 80), torch.zeros(2, 0, 80)).shape == (2, 0, 80)


# centre-ness


def test_centerness_by_hand() -> None:
    # spec PAA section 13, check 17: l = t = 4, r = b = 11; sqrt(4/11 * 4/11)
    box = boxes((0, 0, 15, 15))
    points = torch.tensor([[4.0, 4], [7.5, 7.5], [7.5, 3], [0, 5], [-2, 5], [-2, -2]])
    expected = [4 / 11, 1, math.sqrt(3 / 12), 0, 0, 0]
    torch.testing.assert_close(centerness_target(points, box), torch.tensor(expected))


def test_centerness_without_area_is_finite() -> None:
    assert centerness_target(torch.tensor([[5.0, 5]]), boxes((5, 5, 5, 5))).item() == 0


# all of them


def test_float32_under_autocast_and_for_half_inputs() -> None:
    pred, target = random_boxes(4, 0), random_boxes(4, 1)
    logits, hot = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), one_hot_labels(torch.arange(4) % 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        values = [giou_loss(pred, target), iou_loss(pred, target), sigmoid_focal_loss(logits, hot)]
        halves = [giou_loss(pred.bfloat16(), target.bfloat16()), sigmoid_focal_loss(logits.bfloat16(), hot)]
    expected = [giou_loss(pred, target), iou_loss(pred, target), sigmoid_focal_loss(logits, hot)]
    assert all(torch.equal(value, plain) for value, plain in zip(values, expected, strict=True))
    assert all(value.dtype == torch.float32 for value in halves)
    assert torch.equal(halves[1], sigmoid_focal_loss(logits.bfloat16().float(), hot))


def all_losses(logits: Tensor, labels: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    focal = sigmoid_focal_loss(logits, one_hot_labels(labels, logits.shape[-1]))
    centres = centerness_target((pred[..., :2] + pred[..., 2:]) / 2, target)
    return focal.sum() + (giou_loss(pred, target) * centres.detach() + iou_loss(pred, target)).sum()


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    return (
        logits.requires_grad_(),
        torch.tensor([0, 2, -1, -2]),
        random_boxes(4, 0).requires_grad_(),
        random_boxes(4, 1),
    )


def test_forward_and_backward_do_not_wait_for_the_device() -> None:
    inputs = example()
    with Recorder() as recorder:
        all_losses(*inputs).backward()
    assert recorder.waiting == []


@pytest.mark.compiled
def test_losses_trace() -> None:
    inputs = example()
    traced = torch.compile(all_losses, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(*inputs), all_losses(*inputs), rtol=0, atol=0)


# MMDetection 3.3.0's numbers

CASES = json.loads(str(golden_arrays("losses.npz")["index"]))
FOCAL, GIOU, ENTROPY = ([case for case in CASES if case["tag"].startswith(kind)] for kind in ("focal", "giou", "bce"))


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return golden_arrays("losses.npz")


def check_golden(case: dict[str, Any], arrays: dict[str, np.ndarray], pred: Tensor, values: Tensor) -> None:
    """Weight and reduce `values` as the file's README says, and compare value and gradient by `pred`."""
    tag = case["tag"]
    stored = {name: torch.from_numpy(np.asarray(arrays[f"{tag}/{name}"])) for name in ("value", "grad")}
    if f"{tag}/weight" in arrays:
        weight = torch.from_numpy(arrays[f"{tag}/weight"])
        values = values * weight.reshape(-1, *[1] * (values.dim() - 1))
    values = values * case["loss"]["loss_weight"]
    if f"{tag}/cotangent" in arrays:
        total = (values * torch.from_numpy(arrays[f"{tag}/cotangent"])).sum()
    else:
        total = values = values.sum() / case["avg_factor"] if case["avg_factor"] else values.mean()
    (gradient,) = torch.autograd.grad(total, pred)
    torch.testing.assert_close(values, stored["value"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient, stored["grad"], rtol=1e-3, atol=1e-6)


def leaf(arrays: dict[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(arrays[name]).clone().requires_grad_()


@pytest.mark.parametrize("case", FOCAL, ids=lambda case: case["tag"])
def test_golden_focal(case: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    pred = leaf(arrays, f"{case['tag']}/pred")
    logits = torch.logit(pred) if case["loss"].get("activated") else pred
    labels = torch.from_numpy(arrays[f"{case['tag']}/target"])  # the number of classes is background
    targets = one_hot_labels(labels, pred.shape[1])
    check_golden(case, arrays, pred, sigmoid_focal_loss(logits, targets))


@pytest.mark.parametrize("case", GIOU, ids=lambda case: case["tag"])
def test_golden_giou(case: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    pred, target = leaf(arrays, f"{case['tag']}/pred"), torch.from_numpy(arrays[f"{case['tag']}/target"])
    check_golden(case, arrays, pred, giou_loss(pred, target, eps=1e-6, floor=True))


@pytest.mark.parametrize("case", ENTROPY, ids=lambda case: case["tag"])
def test_golden_cross_entropy(case: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    pred, target = leaf(arrays, f"{case['tag']}/pred"), torch.from_numpy(arrays[f"{case['tag']}/target"])
    check_golden(case, arrays, pred, F.binary_cross_entropy_with_logits(pred, target, reduction="none"))


def test_golden_cases_are_there() -> None:
    assert [len(cases) for cases in (FOCAL, GIOU, ENTROPY)] == [16, 12, 4]

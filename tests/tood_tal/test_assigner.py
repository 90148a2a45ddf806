"""Task Alignment Learning against an obvious version, object by object, and against numbers worked by hand."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tood_tal.assigner as assigner
from core.anchors import AnchorGrid, anchor_grid, anchors_inside
from core.boxes import box_area, box_iou, centres_inside
from core.types import BACKGROUND, IGNORED, Targets
from tests.core.operators import Recorder
from tood_tal.assigner import AlignedAssignment, assign_aligned, explain_assignment, largest, power

SMALL = anchor_grid(((4, 4), (2, 2)), strides=(8, 16))
CLASSES = 5


def targets_of(boxes: Tensor, labels: list[int], size: tuple[int, int] = (64, 64)) -> Targets:
    """One image's objects, all valid."""
    valid = torch.ones(1, len(labels), dtype=torch.bool)
    return Targets(boxes.reshape(1, -1, 4), torch.tensor([labels]), valid, torch.tensor([size]))


# the obvious twin


@dataclass
class Slow:
    """What one image's anchors learn."""

    owner: list[int]
    metric: list[float]
    iou: list[float]
    target: list[float]


def assign_one_by_one(
    scores: Tensor,
    boxes: Tensor,
    centres: Tensor,
    objects: Tensor,
    labels: list[int],
    alpha: float,
    beta: float,
    topk: int,
    conflict: str,
    usable: list[bool],
) -> Slow:
    """One image as section 3.2 tells it: one object after the other, one anchor after the other."""
    count = len(centres)
    offers: dict[int, list[int]] = {}  # objects that keep an anchor
    metric, ious = [[0.0] * count for _ in labels], [[0.0] * count for _ in labels]
    for g, (gt, label) in enumerate(zip(objects, labels, strict=True)):
        ious[g] = box_iou(boxes, gt).tolist()
        score = scores[:, label].tolist()
        metric[g] = [(score[a] ** alpha * ious[g][a] ** beta if usable[a] else 0.0) for a in range(count)]
        inside = centres_inside(centres, gt).tolist()
        for a in sorted(range(count), key=lambda a: (-metric[g][a], a))[:topk]:
            if metric[g][a] > 0 and inside[a]:
                offers.setdefault(a, []).append(g)
    slow = Slow([BACKGROUND if ok else IGNORED for ok in usable], [0.0] * count, [0.0] * count, [0.0] * count)
    areas = box_area(objects.double()).tolist()
    for a, wanted in offers.items():
        slow.owner[a] = (
            max(wanted, key=lambda g: (ious[g][a], -g))
            if conflict == "max_iou"
            else min(wanted, key=lambda g: (areas[g], g))
        )
    for g in range(len(labels)):
        own = [a for a in range(count) if slow.owner[a] == g]
        for a in own:
            slow.metric[a], slow.iou[a] = metric[g][a], ious[g][a]
            best_metric, best_iou = max(metric[g][i] for i in own), max(ious[g][i] for i in own)
            slow.target[a] = metric[g][a] / (best_metric + 1e-7) * best_iou
    return slow


# scenes


@dataclass
class Scenes:
    """A padded batch of predictions and objects."""

    scores: Tensor
    boxes: Tensor
    grid: AnchorGrid
    targets: Targets


def random_scenes(seed: int, grid: AnchorGrid, batch: int, most: int, tied: bool = False) -> Scenes:
    """Boxes near the anchors and near the objects; `tied` ones repeat each other's scores and boxes."""
    random = torch.Generator().manual_seed(seed)
    count, side = len(grid.points), float(grid.points.max()) + 8
    shape = (batch, count)
    centres = grid.points + 6 * torch.randn(*shape, 2, generator=random)
    half = 1 + 14 * torch.rand(*shape, 2, generator=random)
    boxes = torch.cat([centres - half, centres + half], dim=-1)
    scores = torch.rand(*shape, CLASSES, generator=random) ** 2
    if tied:
        boxes = (boxes / 8).round() * 8
        scores = (scores * 3).round() / 3
    numbers = torch.randint(0, most + 1, (batch,), generator=random)
    low = torch.rand(batch, most, 2, generator=random) * side
    objects = torch.cat([low, low + 1 + torch.rand(batch, most, 2, generator=random) * side / 2], dim=-1)
    if tied:
        objects = (objects / 8).round() * 8
        objects[:, 1::3] = objects[:, ::3][:, : objects[:, 1::3].shape[1]]
    valid = torch.arange(most) < numbers[:, None]
    labels = torch.randint(0, CLASSES, (batch, most), generator=random) * valid
    sizes = torch.randint(20, int(side) + 1, (batch, 2), generator=random)
    return Scenes(scores, boxes, grid, Targets(objects * valid[..., None], labels, valid, sizes))


def check_scenes(scenes: Scenes, found: AlignedAssignment, inside: Tensor | None, **rules: Any) -> None:
    """Every image of a batch against the twin."""
    options: dict[str, Any] = {"alpha": 1.0, "beta": 6.0, "topk": 13, "conflict": "max_iou", **rules}
    for image in range(len(scenes.scores)):
        valid = scenes.targets.valid[image]
        slow = assign_one_by_one(
            scenes.scores[image],
            scenes.boxes[image],
            scenes.grid.points,
            scenes.targets.boxes[image, valid],
            scenes.targets.labels[image, valid].tolist(),
            usable=[True] * len(scenes.grid.points) if inside is None else inside[image].tolist(),
            **options,
        )
        assert found.assignment.gt_index[image].tolist() == slow.owner
        labels = [int(scenes.targets.labels[image, g]) if g >= 0 else g for g in slow.owner]
        assert found.assignment.labels[image].tolist() == labels
        for mine, theirs in ((found.metric, slow.metric), (found.ious, slow.iou), (found.targets, slow.target)):
            torch.testing.assert_close(mine[image], torch.tensor(theirs), rtol=1e-4, atol=1e-7)


RULES: list[dict[str, Any]] = [
    {},
    {"conflict": "min_area"},
    {"alpha": 0.5, "beta": 2.0},
    {"alpha": 1.5, "beta": 8.0, "topk": 5},
    {"alpha": 0.5, "beta": 4.5, "topk": 1},
    {"topk": 1000},
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_equals_the_loop_over_objects(rules: dict[str, Any], tied: bool) -> None:
    for seed, padded in ((1, False), (2, True)):
        scenes = random_scenes(seed, SMALL, 42, 12, tied)
        inside = anchors_inside(scenes.grid, scenes.targets.sizes) if padded else None
        found = assign_aligned(
            scenes.scores, scenes.boxes, scenes.grid.points, scenes.targets, anchor_valid=inside, **rules
        )
        check_scenes(scenes, found, inside, **rules)


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_loop_where_blocks_and_chunks_are_cut(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = anchor_grid(((24, 24), (12, 12), (6, 6)), strides=(8, 16, 32))  # 756 anchors: 12 blocks
    monkeypatch.setattr(assigner, "BLOCK", 16)
    for pairs in (1, 5000, 10**9):
        monkeypatch.setattr(assigner, "CPU_PAIRS", pairs)
        scenes = random_scenes(pairs % 97, grid, 3, 25, tied)
        found = assign_aligned(scenes.scores, scenes.boxes, grid.points, scenes.targets)
        check_scenes(scenes, found, None)


def test_many_objects() -> None:
    grid = anchor_grid(((16, 16), (8, 8)), strides=(8, 16))
    scenes = random_scenes(5, grid, 2, 300)
    found = assign_aligned(scenes.scores, scenes.boxes, grid.points, scenes.targets)
    check_scenes(scenes, found, None)


# numbers worked by hand: spec section 9, checks 9 to 12 and 16, 17


def one_anchor_each(scores: list[float], ious: list[float]) -> AlignedAssignment:
    """Anchors whose boxes have these IoUs with one object of 100 x 100."""
    boxes = torch.tensor([[0, 0, 100, 100 * iou] for iou in ious])
    points = torch.full((len(ious), 2), 50.0)
    return assign_aligned(
        torch.tensor(scores)[None, :, None],
        boxes[None],
        points,
        targets_of(torch.tensor([[0.0, 0, 100, 100]]), [0], (100, 100)),
    )


def test_normalised_metric_worked() -> None:
    found = one_anchor_each([0.8, 0.5, 0.2], [0.9, 0.8, 0.6])
    torch.testing.assert_close(found.metric[0], torch.tensor([0.4251528, 0.131072, 0.0093312]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.targets[0], torch.tensor([0.9, 0.2774644, 0.0197531]), rtol=1e-5, atol=1e-6)


def test_normalised_metric_with_maxima_on_different_anchors() -> None:
    found = one_anchor_each([0.9, 0.1], [0.7, 0.95])
    torch.testing.assert_close(found.metric[0], torch.tensor([0.1058841, 0.0735092]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.targets[0], torch.tensor([0.9499991, 0.6595293]), rtol=1e-5, atol=1e-6)


TOY_CENTRES = torch.tensor([[8.0, 8], [16, 16], [24, 16], [32, 16], [40, 16], [56, 16]])
TOY_BOXES = torch.tensor(
    [[0.0, 0, 20, 20], [0, 0, 32, 32], [2, 0, 30, 32], [20, 0, 52, 32], [24, 0, 56, 32], [24, 0, 60, 32]]
)
TOY_SCORES = torch.tensor([[0.6, 0.1], [0.5, 0.1], [0.7, 0.2], [0.3, 0.4], [0.1, 0.5], [0.1, 0.9]])
TOY_OBJECTS = torch.tensor([[0.0, 0, 32, 32], [24, 0, 56, 32]])


def toy(topk: int) -> AlignedAssignment:
    objects = targets_of(TOY_OBJECTS, [0, 1], (32, 64))
    return assign_aligned(TOY_SCORES[None], TOY_BOXES[None], TOY_CENTRES, objects, topk=topk)


def test_toy_worked() -> None:
    found = toy(3)
    assert found.assignment.gt_index.tolist() == [[0, 0, 0, 1, 1, BACKGROUND]]  # the sixth centre lies on the edge
    expected = torch.tensor([0.0042633, 0.9999998, 0.6283133, 0.1771018, 0.9999998, 0])
    torch.testing.assert_close(found.targets[0], expected, rtol=1e-5, atol=1e-6)
    assert float(found.targets.sum()) == pytest.approx(2.8096780, rel=1e-6)


def test_rejected_anchors_are_not_replaced() -> None:
    assert toy(2).assignment.gt_index.tolist() == [[BACKGROUND, 0, 0, BACKGROUND, 1, BACKGROUND]]


@pytest.mark.parametrize(("conflict", "owner", "target"), [("max_iou", 0, 0.878906), ("min_area", 1, 0.284337)])
def test_conflict_worked(conflict: str, owner: int, target: float) -> None:
    objects = targets_of(torch.tensor([[0.0, 0, 32, 32], [8, 8, 24, 24]]), [0, 0])
    found = assign_aligned(
        torch.tensor([[[0.5]]]),
        torch.tensor([[[0.0, 0, 30, 30]]]),
        torch.tensor([[16.0, 16]]),
        objects,
        conflict=conflict,
    )
    assert found.assignment.gt_index.tolist() == [[owner]]
    assert float(found.targets[0, 0]) == pytest.approx(target, abs=2e-6)


@pytest.mark.parametrize(("x", "positive"), [(0.0, False), (0.005, False), (0.02, True)])
def test_centre_more_than_a_hundredth_inside(x: float, positive: bool) -> None:
    found = assign_aligned(
        torch.ones(1, 1, 1),
        torch.tensor([[[0.0, 0, 30, 30]]]),
        torch.tensor([[x, 15.0]]),
        targets_of(torch.tensor([[0.0, 0, 30, 30]]), [0]),
    )
    assert bool(found.assignment.positive[0, 0]) is positive


def test_padding_changes_nothing_inside() -> None:
    grid = anchor_grid(((8, 8), (4, 4)), strides=(8, 16))
    scenes = random_scenes(3, grid, 1, 8)
    targets = scenes.targets._replace(sizes=torch.tensor([[32, 32]]))
    inside = anchors_inside(grid, targets.sizes)
    whole = assign_aligned(scenes.scores, scenes.boxes, grid.points, targets, anchor_valid=inside)
    own = inside[0].nonzero()[:, 0]
    alone = assign_aligned(scenes.scores[:, own], scenes.boxes[:, own], grid.points[own], targets)
    assert whole.assignment.gt_index[0, own].tolist() == alone.assignment.gt_index[0].tolist()
    torch.testing.assert_close(whole.targets[0, own], alone.targets[0], rtol=0, atol=0)
    assert (whole.assignment.gt_index[~inside] == IGNORED).all()
    assert (whole.assignment.labels[~inside] == IGNORED).all()
    assert not whole.targets[~inside].any()


@pytest.mark.parametrize("padding", [0, 3])
def test_image_without_objects(padding: int) -> None:
    scenes = random_scenes(4, SMALL, 2, 5)
    targets = Targets(
        torch.zeros(2, padding, 4),
        torch.zeros(2, padding, dtype=torch.int64),
        torch.zeros(2, padding, dtype=torch.bool),
        scenes.targets.sizes,
    )
    found = assign_aligned(scenes.scores, scenes.boxes, SMALL.points, targets)
    assert (found.assignment.gt_index == BACKGROUND).all()
    assert not found.targets.any()
    assert not found.metric.any()


def test_padding_rows_change_nothing() -> None:
    scenes = random_scenes(6, SMALL, 4, 6)
    found = assign_aligned(scenes.scores, scenes.boxes, SMALL.points, scenes.targets)
    boxes = torch.cat([scenes.targets.boxes, torch.full((4, 2, 4), 7.0)], dim=1)  # whatever padding holds
    boxes[:, -2:, 2:] = 40
    labels = torch.cat([scenes.targets.labels, torch.zeros(4, 2, dtype=torch.int64)], dim=1)
    valid = torch.cat([scenes.targets.valid, torch.zeros(4, 2, dtype=torch.bool)], dim=1)
    more = scenes.targets._replace(boxes=boxes, labels=labels, valid=valid)
    again = assign_aligned(scenes.scores, scenes.boxes, SMALL.points, more)
    assert torch.equal(found.assignment.gt_index, again.assignment.gt_index)
    assert torch.equal(found.targets, again.targets)


# extremes


def test_boxes_without_overlap_or_area_are_never_positive() -> None:
    objects = targets_of(torch.tensor([[0.0, 0, 32, 32]]), [0])
    boxes = torch.tensor([[[40.0, 40, 60, 60], [20, 20, 10, 10], [16, 16, 16, 16], [0, 0, 32, 32]]])
    found = assign_aligned(torch.ones(1, 4, 1), boxes, torch.full((4, 2), 16.0), objects)
    assert found.assignment.gt_index.tolist() == [[BACKGROUND, BACKGROUND, BACKGROUND, 0]]


def test_inside_out_box_whose_sides_would_cancel_the_object() -> None:
    # a negative area of -1024 beside the object's 1024 would make the union 0 and the metric no number
    objects = targets_of(torch.tensor([[0.0, 0, 32, 32]]), [0])
    boxes = torch.tensor([[[0.0, 0, -32, 32], [0, 0, 32, 32]]])
    found = assign_aligned(torch.ones(1, 2, 1), boxes, torch.full((2, 2), 16.0), objects, topk=1)
    assert found.assignment.gt_index.tolist() == [[BACKGROUND, 0]]


def test_huge_and_tiny_boxes() -> None:
    objects = targets_of(torch.tensor([[0.0, 0, 1e6, 1e6], [10, 10, 10.05, 10.05]]), [0, 0])
    boxes = torch.tensor([[[0.0, 0, 1e6, 5e5], [10, 10, 10.05, 10.05], [-1e9, -1e9, 1e9, 1e9]]])
    points = torch.tensor([[500.0, 500], [10.025, 10.025], [50, 50]])
    found = assign_aligned(torch.full((1, 3, 1), 0.5), boxes, points, objects)
    assert found.assignment.gt_index.tolist()[0][:2] == [0, 1]
    assert found.targets.isfinite().all()


def test_half_precision_scores_are_taken_as_float32() -> None:
    objects = targets_of(torch.tensor([[0.0, 0, 100, 100]]), [0], (100, 100))
    boxes = torch.tensor([[[0.0, 0, 100, 10]]])  # 0.01 * 0.1^6 = 1e-8 would be 0 in float16
    found = assign_aligned(torch.full((1, 1, 1), 0.01).half(), boxes, torch.full((1, 2), 5.0), objects)
    assert found.metric.dtype == torch.float32
    assert float(found.metric[0, 0]) == pytest.approx(1e-8, rel=1e-2)
    assert found.assignment.positive.all()


def test_no_gradient_through_the_assignment() -> None:
    scenes = random_scenes(7, SMALL, 2, 5)
    found = assign_aligned(scenes.scores.requires_grad_(), scenes.boxes.requires_grad_(), SMALL.points, scenes.targets)
    assert not any(part.requires_grad for part in (found.targets, found.ious, found.metric))


def test_nothing_waits_for_the_device() -> None:
    scenes = random_scenes(8, SMALL, 2, 5)
    with Recorder() as recorder:
        assign_aligned(scenes.scores, scenes.boxes, SMALL.points, scenes.targets)
    assert not recorder.waiting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha and beta must be above 0"),
        ({"beta": -1.0}, "alpha and beta must be above 0"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"conflict": "largest"}, "conflict must be max_iou or min_area"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    scenes = random_scenes(9, SMALL, 1, 2)
    with pytest.raises(ValueError, match=message):
        assign_aligned(scenes.scores, scenes.boxes, SMALL.points, scenes.targets, **options)


# parts


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 5.0, 6.0, 8.0, 0.5, 1.5, 4.5, 100.0])
def test_power(exponent: float) -> None:
    values = torch.linspace(0, 1, 50)
    torch.testing.assert_close(power(values, exponent), values.double().pow(exponent).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (5, 5), (64, 3), (65, 13), (1000, 13), (1000, 1), (4096, 13)])
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_largest_by_value_then_place(size: int, count: int, levels: int) -> None:
    random = torch.Generator().manual_seed(size + count + levels)
    values = torch.randint(0, levels, (2, 3, size), generator=random).float() / levels
    found, places = largest(values, count)
    for b in range(2):
        for g in range(3):
            row = values[b, g].tolist()
            expected = sorted(range(size), key=lambda a: (-row[a], a))[:count]
            assert places[b, g].tolist() == expected
            assert found[b, g].tolist() == [row[a] for a in expected]


def test_details_agree_with_the_result() -> None:
    scenes = random_scenes(10, SMALL, 3, 6)
    details = explain_assignment(scenes.scores, scenes.boxes, SMALL.points, scenes.targets)
    assert details.anchors.shape[-1] == 13
    assert (details.metric.diff(dim=-1) <= 0).all()
    owners = details.result.assignment.gt_index
    for image, g, k in details.positive.nonzero().tolist():
        anchor = int(details.anchors[image, g, k])
        assert owners[image, anchor] >= 0
        if owners[image, anchor] == g:
            assert details.result.ious[image, anchor] == details.ious[image, g, k]

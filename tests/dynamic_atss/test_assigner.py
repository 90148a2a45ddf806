"""Combined IoUs: the specification's worked cases, ATSS as a limit, a loop written from the paper, edges."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from core.anchors import AnchorGrid, anchor_grid, anchors_inside, level_shapes
from core.atss import assign_atss
from core.boxes import box_iou, centres_inside
from core.geometry import LEGACY, MODERN, Geometry
from core.types import BACKGROUND, IGNORED, Targets
from dynamic_atss.assigner import assign_combined, combined_iou, combined_threshold, explain_assignment
from dynamic_atss.config import PRESETS, Config

# Spec section 10, set T
CANVAS = (256, 256)
OBJECTS = [[37.3, 52.9, 171.8, 160.2], [90.6, 100.4, 231.7, 214.8]]
CROWDED = [[40.3, 40.9, 170.1, 170.5], [52.7, 44.2, 190.6, 182.4]]
MODERN_SETS = [
    {1126, 1127, 1128, 1141, 1142, 1143, 1144, 1158, 1159},
    {1177, 1178, 1179, 1193, 1194, 1195, 1209, 1210, 1211},
]
LEGACY_SETS = [
    {1109, 1110, 1111, 1125, 1126, 1127, 1141, 1142, 1143},
    {1161, 1162, 1176, 1177, 1178, 1179, 1193, 1194, 1195},
]


def targets_of(boxes: list[list[float]], canvas: tuple[int, int] = CANVAS) -> Targets:
    count = len(boxes)
    valid = torch.ones(1, count, dtype=torch.bool)
    return Targets(
        torch.tensor(boxes).reshape(1, count, 4), torch.arange(count)[None], valid, torch.tensor([list(canvas)])
    )


def sets_of(gt_index: Tensor, count: int) -> list[set[int]]:
    return [set((gt_index == g).nonzero()[:, 0].tolist()) for g in range(count)]


def grid_of(geometry: Geometry) -> AnchorGrid:
    return anchor_grid(level_shapes(CANVAS), geometry)


def test_threshold_by_hand() -> None:
    # Check 2. A: mean .3, std sqrt((.04 + .01 + 0 + .09) / 3) = .216025; P: mean .4, std .216025; sum 1.132049.
    anchor = torch.tensor([[[0.1, 0.2, 0.3, 0.6]]])
    predicted = torch.tensor([[[0.3, 0.7, 0.2, 0.4]]])
    valid = torch.ones(1, 1, 4, dtype=torch.bool)

    def positives(pred_weight: float, anchor_weight: float) -> tuple[float, list[int]]:
        ious = predicted if pred_weight else None
        threshold = combined_threshold(ious, anchor, valid, pred_weight, anchor_weight)
        reached = combined_iou(ious, anchor, pred_weight, anchor_weight) >= threshold[..., None]
        return float(threshold), reached[0, 0].nonzero()[:, 0].tolist()

    assert positives(0.0, 1.0) == (pytest.approx(0.516025, abs=1e-6), [3])
    assert positives(1.0, 0.0) == (pytest.approx(0.616025, abs=1e-6), [1])
    assert positives(1.0, 1.0) == (pytest.approx(1.132049, abs=1e-6), [])
    assert positives(0.5, 2.0)[0] == pytest.approx(0.5 * 0.616025 + 2 * 0.516025, abs=1e-6)


@pytest.mark.parametrize(
    ("geometry", "thresholds", "sets"),
    [(MODERN, (0.515640, 0.520963), MODERN_SETS), (LEGACY, (0.517067, 0.531462), LEGACY_SETS)],
)
def test_predictions_equal_to_the_anchors(
    geometry: Geometry, thresholds: tuple[float, float], sets: list[set[int]]
) -> None:
    # Checks 3 and 4: ATSS's positives, its thresholds doubled exactly.
    grid, targets = grid_of(geometry), targets_of(OBJECTS)
    plain = explain_assignment(grid, targets, grid.boxes[None], geometry=geometry, pred_weight=0.0)
    torch.testing.assert_close(plain.thresholds[0], torch.tensor(thresholds).double(), rtol=0, atol=1e-5)
    assert sets_of(plain.assignment.gt_index[0], 2) == sets
    both = explain_assignment(grid, targets, grid.boxes[None], geometry=geometry)
    assert torch.equal(both.thresholds, 2 * plain.thresholds)
    assert torch.equal(both.assignment.gt_index, plain.assignment.gt_index)


@pytest.mark.parametrize(("geometry", "threshold"), [(MODERN, 1.075200), (LEGACY, 1.078046)])
def test_a_perfect_prediction_joins(geometry: Geometry, threshold: float) -> None:
    # Check 5: anchor 429 of P3 predicts the first object exactly.
    grid, targets = grid_of(geometry), targets_of(OBJECTS)
    predicted = grid.boxes.clone()
    predicted[429] = targets.boxes[0, 0]
    details = explain_assignment(grid, targets, predicted[None], geometry=geometry)
    assert float(details.thresholds[0, 0]) == pytest.approx(threshold, abs=1e-5)
    first, second = sets_of(details.assignment.gt_index[0], 2)
    expected = MODERN_SETS if geometry is MODERN else LEGACY_SETS
    assert (first, second) == (expected[0] | {429}, expected[1])


@pytest.mark.parametrize(
    ("weights", "thresholds", "lost"),
    [
        ((1.0, 1.0), (1.010101, 1.032635), (set(), set())),
        ((1.0, 0.0), (0.494461, 0.511672), ({1128, 1144}, {1179})),
        ((1.0, 0.5), (0.752281, 0.772153), ({1128}, set())),
        ((0.5, 1.0), (0.762871, 0.776799), (set(), set())),
    ],
)
def test_shifted_predictions(
    weights: tuple[float, float], thresholds: tuple[float, float], lost: tuple[set[int], set[int]]
) -> None:
    # Check 6: every prediction is its anchor shifted by a tenth of its width and a twentieth of its height.
    grid, targets = grid_of(MODERN), targets_of(OBJECTS)
    sides = grid.boxes[:, 2:] - grid.boxes[:, :2]
    predicted = grid.boxes + (sides * torch.tensor([0.1, -0.05])).repeat(1, 2)
    details = explain_assignment(grid, targets, predicted[None], pred_weight=weights[0], anchor_weight=weights[1])
    torch.testing.assert_close(details.thresholds[0], torch.tensor(thresholds).double(), rtol=0, atol=1e-5)
    expected = [whole - gone for whole, gone in zip(MODERN_SETS, lost, strict=True)]
    assert sets_of(details.assignment.gt_index[0], 2) == expected


def test_conflicts_go_to_the_highest_combined_iou() -> None:
    # Check 7: six anchors are wanted by both objects.
    shared = {1127, 1128, 1142, 1143, 1144, 1159}
    grid, targets = grid_of(MODERN), targets_of(CROWDED)
    plain = explain_assignment(grid, targets, grid.boxes[None], pred_weight=0.0)
    first, second = sets_of(plain.assignment.gt_index[0], 2)
    assert shared & first == {1127, 1142, 1143}
    assert shared & second == shared - {1127, 1142, 1143}
    predicted = targets.boxes[:, 1:].expand(1, len(grid.boxes), 4)
    details = explain_assignment(grid, targets, predicted)
    torch.testing.assert_close(details.thresholds[0], torch.tensor([1.235355, 1.537049]).double(), rtol=0, atol=1e-5)
    assert torch.equal(details.positive, plain.positive)
    assert shared <= sets_of(details.assignment.gt_index[0], 2)[1]


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_candidates_that_equal_their_threshold_reach_it(weight: float) -> None:
    # The same box everywhere: all predicted IoUs are equal, their deviation is 0, and all candidates inside learn.
    grid, targets = grid_of(MODERN), targets_of(CROWDED[:1])
    predicted = targets.boxes.expand(1, len(grid.boxes), 4) + torch.tensor([3.0, 1, -2, 5])
    details = explain_assignment(grid, targets, predicted, pred_weight=weight, anchor_weight=0.0)
    inside = centres_inside(grid.points[details.anchors], targets.boxes[:, :, None])
    assert torch.equal(details.positive, details.valid & inside)
    assert details.positive.sum() > 9


def test_combined_ious_are_exact() -> None:
    # in float64 like the threshold: a float32 product would round
    predicted, anchor = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    for ious, pred_weight in ((predicted, 0.7), (None, 0.0)):
        expected = 0.3 * anchor.double() + (0 if ious is None else 0.7 * predicted.double())
        assert torch.equal(combined_iou(ious, anchor, pred_weight, 0.3), expected)


def test_places_without_a_candidate_want_nothing() -> None:
    # A quarter of the canvas is image: P5 has one anchor of four there, and the other three places hold the number 0.
    # Anchor 0 predicts the object perfectly and its centre is inside, but nine anchors of P3 are nearer.
    grid = anchor_grid(level_shapes((64, 64)))
    targets = targets_of([[-20.0, -20, 100, 100]], (32, 32))
    predicted = grid.boxes.clone()
    predicted[0] = targets.boxes[0, 0]
    details = explain_assignment(grid, targets, predicted[None], anchor_valid=anchors_inside(grid, targets.sizes))
    assert not details.valid.all()
    assert (details.combined[~details.valid] > details.thresholds[0, 0]).all()
    assert 0 not in details.anchors[details.valid].tolist()
    assert details.assignment.gt_index[0, 0].item() == BACKGROUND


def random_scene(seed: int, counts: list[int], canvas: tuple[int, int] = (128, 160)) -> tuple[Targets, Tensor]:
    """Objects of any size, and predictions that lie near the anchors or anywhere."""
    generator = torch.Generator().manual_seed(seed)
    slots = max([*counts, 0])
    height, width = canvas
    centre = torch.rand(len(counts), slots, 2, generator=generator) * torch.tensor([width, height])
    half = 2 + 60 * torch.rand(len(counts), slots, 2, generator=generator) ** 2
    valid = torch.arange(slots) < torch.tensor(counts)[:, None]
    boxes = torch.cat([centre - half, centre + half], dim=-1) * valid[..., None]
    labels = torch.randint(80, (len(counts), slots), generator=generator) * valid
    anchors = anchor_grid(level_shapes(canvas)).boxes
    shift = torch.randn(len(counts), len(anchors), 4, generator=generator) * 12
    return Targets(boxes, labels, valid, torch.tensor([canvas] * len(counts))), anchors + shift


class Measured(NamedTuple):
    """An object beside every anchor of the canvas, and what each kind of IoU must reach."""

    candidate: np.ndarray
    inside: np.ndarray
    predicted_iou: np.ndarray
    anchor_iou: np.ndarray
    predicted_threshold: float
    anchor_threshold: float


def measure_object(
    grid: AnchorGrid, box: Tensor, predicted: Tensor, usable: Tensor, geometry: Geometry, k: int
) -> Measured:
    """ATSS, Algorithm 1, lines 3 to 10 and 12, for one object: spec section 1.1, steps 1 to 3 and 5."""
    centre = (box[:2] + box[2:]) / 2
    distance = (grid.points.double() - centre.double()).square().sum(dim=1).numpy()
    candidate, first = np.zeros(len(distance), dtype=bool), 0
    for size in grid.level_sizes:
        order = first + distance[first : first + size].argsort(kind="stable")
        candidate[[anchor for anchor in order if usable[anchor]][:k]] = True
        first += size
    (x, y), (x1, y1, x2, y2) = grid.points.numpy().T, box.numpy()
    inside = np.minimum.reduce([x - x1, y - y1, x2 - x, y2 - y]) > 0.01
    ious = [box_iou(boxes, box, geometry).double().numpy() for boxes in (predicted, grid.boxes)]
    thresholds = [float(part[candidate].mean() + part[candidate].std(ddof=1)) for part in ious]
    return Measured(candidate, inside, ious[0], ious[1], thresholds[0], thresholds[1])


def assign_one_by_one(objects: list[Measured], usable: Tensor, pred_weight: float, anchor_weight: float) -> list[int]:
    """Paper, section 3.2 and Table 3: objects take what reaches the threshold, later ones only with a larger sum."""
    owner = np.where(usable.numpy(), BACKGROUND, IGNORED)
    best = np.full(len(owner), -1.0)
    for number, it in enumerate(objects):
        combined = pred_weight * it.predicted_iou + anchor_weight * it.anchor_iou
        threshold = pred_weight * it.predicted_threshold + anchor_weight * it.anchor_threshold
        won = it.candidate & (combined >= threshold) & it.inside & (combined > best)
        owner[won], best[won] = number, combined[won]
    return owner.tolist()


MOVING = "weights_up_1", "weights_1_down", "weights_up_down"
FIXED = "combined", "predicted_only", "atss_r50_1x", "weights_0p5_1", "weights_1p5_1", "weights_1_0p5", "weights_1_1p5"
WEIGHTS = [  # w_p, w_a of the paper's tables 2 and 3; those that move: at the start, on the way and at the end
    *(PRESETS[name].weights_at(1, 1) for name in FIXED),
    *(PRESETS[name].weights_at(step, 90_000) for name in MOVING for step in (1, 30_001, 60_001, 90_000)),
]


def edge_scenes(grid: AnchorGrid, images: int, largest: int, seed: int) -> tuple[Targets, Tensor]:
    """Images of any size on a canvas with 0 to `largest` objects, and their predictions.

    Objects: anywhere; centred on anchors and between them, so that distances are equal; twice the same; specks and
    lines; larger than the image; wholly outside. Predictions: near the anchors or equal to them, the first object
    everywhere, objects at random places, points.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def pick(count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=generator)

    counts = pick(largest + 1, images)
    counts[0] = largest
    slots = int(counts.max())
    canvas = torch.tensor(grid.shapes[0]) * grid.strides[0]
    scattered = (1.2 * uniform(images, slots, 2) - 0.1) * canvas.flip(0)
    centre = torch.where(pick(2, images, slots, 1) == 0, scattered, 4 * pick(25, images, slots, 2))
    sides = uniform(images, slots, 2) * torch.tensor([0.25, 20, 50, 100])[pick(4, images, slots, 1)]
    half = torch.where(pick(2, images, slots, 1) == 0, sides, 4 * pick(12, images, slots, 2))
    boxes = torch.cat([centre - half, centre + half], dim=-1)
    again = (pick(4, images, slots) == 0) & (torch.arange(slots) > 0)
    boxes = torch.where(again[..., None], boxes.roll(1, dims=1), boxes)
    valid = torch.arange(slots) < counts[:, None]
    boxes = boxes * valid[..., None]
    sizes = 1 + (uniform(images, 2) * canvas).long()
    sizes[::3] = canvas
    shape = images, len(grid.boxes)
    noise = torch.randn(*shape, 4, generator=generator) * (20 * pick(3, images, 1, 1))
    predicted = grid.boxes + noise
    if slots:
        place = torch.where(pick(4, images, 1) == 0, 0, pick(slots, *shape))
        at_object = boxes.gather(1, place[..., None].expand(-1, -1, 4))
        predicted = torch.where((pick(8, *shape, 1) == 0) | (pick(6, images, 1, 1) == 0), at_object, predicted)
    predicted = torch.where(pick(20, *shape, 1) == 0, predicted[..., :2].repeat(1, 1, 2), predicted)
    labels = pick(80, images, slots) * valid
    return Targets(boxes, labels, valid, sizes), predicted


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("geometry", [MODERN, LEGACY])
def test_all_variants_equal_a_loop_over_objects_on_a_quarter_of_thousand_scenes(
    geometry: Geometry, masked: bool
) -> None:
    sizes = [(40, 3, (64, 96)), (40, 8, (96, 64)), (40, 20, (64, 64)), (3, 60, (64, 96)), (2, 300, (96, 96))]
    seed = 100 * masked + 1000 * (geometry is LEGACY)
    for images, largest, canvas in [*sizes, *sizes]:
        seed += 1
        grid = anchor_grid(level_shapes(canvas), geometry)
        targets, predicted = edge_scenes(grid, images, largest, seed)
        inside = anchors_inside(grid, targets.sizes)
        usable = inside if masked else torch.ones_like(inside)
        k = 4 if seed % 4 == 0 else 9
        measured = [
            [measure_object(grid, box, boxes, mask, geometry, k) for box in objects[valid]]
            for objects, valid, boxes, mask in zip(targets.boxes, targets.valid, predicted, usable, strict=True)
        ]
        for pred_weight, anchor_weight in WEIGHTS:
            found = assign_combined(
                grid,
                targets,
                predicted,
                geometry=geometry,
                pred_weight=pred_weight,
                anchor_weight=anchor_weight,
                k=k,
                anchor_valid=inside if masked else None,
            )
            expected = [
                assign_one_by_one(objects, mask, pred_weight, anchor_weight)
                for objects, mask in zip(measured, usable, strict=True)
            ]
            assert found.gt_index.tolist() == expected


def test_thousand_scenes_of_predictions_equal_to_the_anchors() -> None:
    grid = anchor_grid(level_shapes((128, 160)))
    generator = torch.Generator().manual_seed(0)
    for seed in range(100):  # ten scenes each
        largest = 300 if seed % 10 == 0 else (3, 10, 30)[seed % 3]
        counts = torch.randint(largest + 1, (10,), generator=generator).tolist()
        targets, _ = random_scene(seed, counts)
        plain, _ = assign_atss(grid, targets, MODERN)
        both = assign_combined(grid, targets, grid.boxes.expand(10, -1, -1))
        assert torch.equal(both.gt_index, plain.gt_index)
        assert torch.equal(both.labels, plain.labels)


def test_without_predicted_ious_it_is_atss_whatever_is_predicted() -> None:
    grid = anchor_grid(level_shapes((128, 160)))
    targets, _ = random_scene(1, [7, 3])
    nonsense = torch.full((2, len(grid.boxes), 4), torch.nan)
    inside = anchors_inside(grid, torch.tensor([[96, 96], [128, 160]]))
    plain, _ = assign_atss(grid, targets, MODERN, anchor_valid=inside)
    found = assign_combined(grid, targets, nonsense, pred_weight=0.0, anchor_valid=inside)
    assert torch.equal(found.gt_index, plain.gt_index)
    assert (found.labels[~inside] == IGNORED).all()


def test_a_common_factor_changes_nothing() -> None:
    grid = anchor_grid(level_shapes((128, 160)))
    targets, predicted = random_scene(2, [12, 5])
    one = assign_combined(grid, targets, predicted)
    two = assign_combined(grid, targets, predicted, pred_weight=2.0, anchor_weight=2.0)
    assert torch.equal(one.gt_index, two.gt_index)


def test_nan_predictions_leave_other_objects_alone() -> None:
    grid, targets = grid_of(MODERN), targets_of([[10.0, 10, 60, 60], [150.0, 150, 240, 240]])
    whole = assign_combined(grid, targets, grid.boxes[None])
    predicted = grid.boxes.clone()
    predicted[0] = torch.nan  # a candidate of the first object at most
    found = assign_combined(grid, targets, predicted[None])
    assert torch.equal(found.gt_index == 1, whole.gt_index == 1)


def test_labels_carry_no_gradient() -> None:
    grid, targets = grid_of(MODERN), targets_of(OBJECTS)
    predicted = grid.boxes[None].clone().requires_grad_()
    details = explain_assignment(grid, targets, predicted)
    assert not details.combined.requires_grad
    assert not details.thresholds.requires_grad


@pytest.mark.parametrize(("pred", "anchor"), [(0.0, 0.0), (-1.0, 1.0), (1.0, -1.0)])
def test_impossible_weights(pred: float, anchor: float) -> None:
    grid = grid_of(MODERN)
    with pytest.raises(ValueError, match="weights must be at least 0 and not both 0"):
        assign_combined(grid, targets_of(OBJECTS), grid.boxes[None], pred_weight=pred, anchor_weight=anchor)


def test_schedules_by_hand() -> None:
    # Table 3: D_up = step / steps, D_down = 1 - step / steps, steps counted from 1
    config = PRESETS["weights_up_down"]
    assert config.weights_at(1, 4) == (0.25, 0.75)
    assert config.weights_at(4, 4) == (1.0, 0.0)
    assert PRESETS["weights_up_1"].weights_at(2, 4) == (0.5, 1.0)
    assert PRESETS["weights_1_down"].weights_at(3, 4) == (1.0, 0.25)
    assert Config(pred_weight=1.5).weights_at(1, 9) == (1.5, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred_weight": 0.0, "anchor_weight": 0.0}, "must not both be 0"),
        ({"pred_weight": 0.0, "anchor_schedule": "down"}, "pred_weight must be above 0"),
        ({"host": "gflv2", "geometry": "legacy"}, "host gflv2 exists in geometry modern only"),
        ({"pred_weight": -0.5}, "pred_weight must be at least 0"),
    ],
)
def test_impossible_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Config(), **changes)

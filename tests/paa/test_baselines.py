"""The assignments and branches that the paper compares PAA with: by hand, slow twins, what each option changes."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.anchors import anchor_grid, anchors_inside, level_shapes
from core.boxes import box_iou
from core.geometry import LEGACY, MODERN, Geometry
from core.losses import giou_loss
from core.types import BACKGROUND, IGNORED, Assignment, Targets
from paa.assigner import Candidates, assign_hard_iou, explain_assignment, fixed_separation
from paa.config import PRESETS, Config
from paa.losses import assign, assigned_losses, compute_losses, normalisers
from paa.model import PAA, Outputs
from paa.postprocess import detect
from paa.profiles import ATSS_PROFILES, PAA_PROFILES

SHAPES = level_shapes((96, 128))


def random_targets(seed: int, counts: list[int], canvas: tuple[int, int] = (96, 128)) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    slots = max(counts)
    corner = torch.rand(len(counts), slots, 2, generator=generator) * torch.tensor([canvas[1] - 24, canvas[0] - 24])
    side = 8 + torch.rand(len(counts), slots, 2, generator=generator) * 60
    valid = torch.arange(slots) < torch.tensor(counts)[:, None]
    boxes = torch.cat([corner, corner + side], dim=-1) * valid[..., None]
    labels = torch.randint(3, (len(counts), slots), generator=generator) * valid
    return Targets(boxes, labels, valid, torch.tensor([canvas] * len(counts)))


def random_outputs(seed: int, batch: int, geometry: Geometry = MODERN) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    grid = anchor_grid(SHAPES, geometry)
    shape = (batch, len(grid.boxes))
    logits, deltas, quality = (torch.randn(*shape, size, generator=generator) for size in (3, 4, 1))
    return Outputs(logits, deltas, quality[..., 0], grid)


def hard_iou_twin(anchors: Tensor, points: Tensor, boxes: Tensor, geometry: Geometry) -> list[int]:
    """RetinaNet's rule, anchor by anchor."""
    if not len(boxes):
        return [BACKGROUND] * len(anchors)
    ious = [[float(box_iou(anchor, box, geometry)) for box in boxes] for anchor in anchors]
    best_of_object = [max(row[g] for row in ious) for g in range(len(boxes))]
    result = []
    for row, (x, y) in zip(ious, points.tolist(), strict=True):
        own = row.index(max(row))
        favourite = any(row[g] == best_of_object[g] > 0 for g in range(len(boxes)))
        if max(row) >= 0.5 or favourite:
            x1, y1, x2, y2 = boxes[own].tolist()
            result.append(own if min(x - x1, y - y1, x2 - x, y2 - y) > 0.01 else IGNORED)
        else:
            result.append(IGNORED if max(row) >= 0.4 else BACKGROUND)
    return result


@pytest.mark.parametrize("geometry", [MODERN, LEGACY])
@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [3, 12], [25, 1]])
def test_hard_iou_equals_its_twin(counts: list[int], geometry: Geometry) -> None:
    grid = anchor_grid(SHAPES, geometry, scale=4.0)
    for seed in range(3):
        targets = random_targets(seed, counts)
        assignment = assign_hard_iou(grid, targets, geometry)
        for image, count in enumerate(counts):
            expected = hard_iou_twin(grid.boxes, grid.points, targets.boxes[image, :count], geometry)
            assert assignment.gt_index[image].tolist() == expected
            labels = [targets.labels[image, g].item() if g >= 0 else g for g in expected]
            assert assignment.labels[image].tolist() == labels


def test_hard_iou_by_hand() -> None:
    # Anchors of 64 px on P3, centred at multiples of 8. The object is the anchor at (32, 32). Shifted by
    # 8 k px an anchor has IoU (64 - 8k) / (64 + 8k): 1, .78, .6, .4545, .33 for k = 0 ... 4.
    grid = anchor_grid(level_shapes((128, 128)))
    targets = Targets(
        torch.tensor([[[0.0, 0, 64, 64]]]), torch.tensor([[1]]), torch.tensor([[True]]), torch.tensor([[128, 128]])
    )
    labels = assign_hard_iou(grid, targets).labels[0]
    row = [int(labels[4 * 16 + 4 + k]) for k in range(5)]
    assert row == [1, 1, 1, IGNORED, BACKGROUND]
    assert set(labels[256:].tolist()) == {BACKGROUND}  # P4 and above: IoU 1/4 at most


def test_hard_iou_ignores_padding_and_uncentred_matches() -> None:
    grid = anchor_grid(level_shapes((128, 128)))
    box = torch.tensor([[[10.0, 10, 14, 14]]])  # holds no anchor centre: its best anchor is doubtful, not positive
    targets = Targets(box, torch.tensor([[0]]), torch.tensor([[True]]), torch.tensor([[64, 64]]))
    assignment = assign_hard_iou(grid, targets, anchor_valid=anchors_inside(grid, targets.sizes))
    assert not assignment.positive.any()
    cells = (assignment.labels[0, :256] == IGNORED).view(16, 16)
    assert cells[8:].all()
    assert cells[:, 8:].all()
    assert int(cells[:8, :8].sum()) > 0


def test_fixed_separation_by_hand() -> None:
    # exp(-1) = .368, exp(-2.2) = .111, exp(-2.4) = .091; the second candidate of equal ones comes later
    losses = torch.tensor([[[1.0, 2.2, 2.4, 1.0, torch.inf]], [[torch.inf] * 5]])
    candidates = Candidates(torch.zeros(2, 1, 5, dtype=torch.int64), losses, losses.isfinite())
    two = fixed_separation(candidates, 2, 0.0)
    assert two.positive.tolist() == [[[True, False, False, True, False]], [[False] * 5]]
    assert fixed_separation(candidates, 1, 0.0).positive[0, 0].tolist() == [True, False, False, False, False]
    above = fixed_separation(candidates, None, 0.1)
    assert above.positive.tolist() == [[[True, True, False, True, False]], [[False] * 5]]
    assert not two.ignored.any()
    assert not above.ignored.any()


@pytest.mark.parametrize("number", [1, 4, 100])
def test_fixed_number_in_a_batch(number: int) -> None:
    outputs, targets = random_outputs(0, 2), random_targets(1, [5, 2])
    details = explain_assignment(*outputs[:2], outputs.grid, targets, scheme="number", fixed_number=number)
    assert details.mixture is None
    for image in range(2):
        for g in range(5):
            losses = details.candidates.losses[image, g][details.candidates.valid[image, g]].sort()[0]
            mine = (details.assignment.gt_index[image] == g).nonzero()[:, 0]
            assert len(mine) == min(number, len(losses))
            torch.testing.assert_close(details.scores[image, mine].sort()[0], losses[:number])


def test_fresh_network_has_no_anchor_in_range() -> None:
    # Spec check 8: at the start a matched anchor scores 1.886 or worse, exp(-1.128) = .32 without any box loss.
    grid = anchor_grid(SHAPES)
    shape = (1, len(grid.boxes))
    targets = random_targets(3, [6])
    logits = torch.full((*shape, 3), -math.log(99))
    for limit, expected in ((0.3, False), (0.1, True)):
        details = explain_assignment(
            logits, torch.zeros(*shape, 4), grid, targets, scheme="range", score_range=limit, threshold=0.1
        )
        assert bool(details.assignment.positive.any()) is expected


def test_centerness_and_none_by_hand() -> None:
    # The object [0, 0, 32, 16] and the P3 anchor at (8, 8): l, t, r, b = 8, 8, 24, 8, centre-ness sqrt(8/24) = .57735.
    # IoU of [-24, -24, 40, 40] with it: 512 / 4096 = .125; the object lies inside, so GIoU loss 1 - .125 = .875.
    grid = anchor_grid(level_shapes((32, 32)))
    anchors = len(grid.boxes)
    outputs = Outputs(torch.zeros(1, anchors, 2), torch.zeros(1, anchors, 4), torch.zeros(1, anchors), grid)
    targets = Targets(
        torch.tensor([[[0.0, 0, 32, 16]]]), torch.tensor([[0]]), torch.tensor([[True]]), torch.tensor([[32, 32]])
    )
    index = torch.full((1, anchors), BACKGROUND)
    index[0, 5] = 0
    assignment = assign(outputs, targets, Config())._replace(gt_index=index, labels=index.clone())
    centre = assigned_losses(outputs, targets, assignment, Config(quality="centerness", box_weight=2.0))
    assert float(centre["loss_box"]) == pytest.approx(2 * 0.875, rel=1e-5)  # one weight over itself
    assert float(centre["loss_centerness"]) == pytest.approx(0.5 * math.log(2), rel=1e-5)  # BCE at logit 0 is ln 2
    none = assigned_losses(outputs._replace(quality_logits=None), targets, assignment, Config(quality="none"))
    assert set(none) == {"loss_cls", "loss_box", "positives"}
    assert float(none["loss_box"]) == pytest.approx(1.3 * 0.875, rel=1e-5)
    assert float(none["positives"]) == 1


def test_weights_of_two_positives() -> None:
    # As above with a second positive at (16, 8), the object's centre: centre-ness 1, GIoU loss .875 as well, by hand
    # (.57735 * .875 + 1 * .875) / 1.57735 = .875; at deltas dx = 10 the first box moves and only its own weight counts.
    grid = anchor_grid(level_shapes((32, 32)))
    anchors = len(grid.boxes)
    deltas = torch.zeros(1, anchors, 4)
    deltas[0, 5, 0] = 10.0  # one anchor's width to the right: [40, -24, 104, 40]
    outputs = Outputs(torch.zeros(1, anchors, 2), deltas, torch.zeros(1, anchors), grid)
    box = torch.tensor([[[0.0, 0, 32, 16]]])
    targets = Targets(box, torch.tensor([[0]]), torch.tensor([[True]]), torch.tensor([[32, 32]]))
    index = torch.full((1, anchors), BACKGROUND)
    index[0, 5] = index[0, 6] = 0
    assignment = assign(outputs, targets, Config())._replace(gt_index=index, labels=index.clone())
    moved = float(giou_loss(torch.tensor([40.0, -24, 104, 40]), box[0, 0]))
    losses = assigned_losses(outputs, targets, assignment, Config(quality="centerness", box_weight=1.0))
    weight = math.sqrt(8 / 24)
    assert float(losses["loss_box"]) == pytest.approx((weight * moved + 0.875) / (weight + 1), rel=1e-5)
    plain = assigned_losses(outputs, targets, assignment, Config(quality="none", box_weight=1.0))
    assert float(plain["loss_box"]) == pytest.approx((moved + 0.875) / 2, rel=1e-5)


def test_mmdet_atss_counts_an_empty_image_as_one() -> None:
    targets = random_targets(5, [4, 0])
    outputs = random_outputs(6, 2)
    config = replace(PRESETS["atss_centerness"], profile="mmdet")
    assignment = assign(outputs, targets, config)
    positives = int(assignment.positive.sum())
    weights = torch.zeros(outputs.logits.shape[:2])
    assert [float(x) for x in normalisers(assignment, weights, config)] == [positives + 1, 1.0]
    ours = replace(config, profile="ours")
    assert float(normalisers(assignment, weights, ours)[0]) == positives


def test_without_the_branch_both_divisors_are_the_number_of_positives() -> None:
    # also where there is none: 1, not the floor of a sum of weights
    targets, outputs = random_targets(5, [0, 0]), random_outputs(6, 2)
    for profile in ("ours", "official"):
        config = Config(profile=profile, quality="none")  # type: ignore[arg-type]
        assignment = assign(outputs, targets, config)
        weights = torch.zeros(outputs.logits.shape[:2])
        assert [float(x) for x in normalisers(assignment, weights, config)] == [1.0, 1.0]


def test_mmdet_divides_only_the_class_loss_by_the_images() -> None:
    # One positive in two images: classes are divided by 2, the IoU loss by 1, so it is .5 * ln 2 at logit 0.
    targets, outputs = random_targets(5, [1, 0]), random_outputs(6, 2)
    assert outputs.quality_logits is not None
    outputs = outputs._replace(quality_logits=torch.zeros_like(outputs.quality_logits))
    index = torch.full(outputs.logits.shape[:2], BACKGROUND)
    index[0, 7] = 0
    labels = torch.where(index >= 0, targets.labels[:, :1], BACKGROUND)
    found = {
        profile: assigned_losses(outputs, targets, Assignment(index, labels), Config(profile=profile))  # type: ignore[arg-type]
        for profile in ("ours", "mmdet")
    }
    assert float(found["ours"]["positives"]) == 0.5
    assert float(found["mmdet"]["loss_iou"]) == pytest.approx(0.5 * math.log(2), rel=1e-5)
    assert float(found["mmdet"]["loss_cls"]) == pytest.approx(float(found["ours"]["loss_cls"]) / 2, rel=1e-5)


def test_rules_follow_the_assigner() -> None:
    assert Config(profile="mmdet").rules is PAA_PROFILES["mmdet"]
    assert replace(PRESETS["atss_centerness"], profile="mmdet").rules is ATSS_PROFILES["mmdet"]


def test_assigners_differ() -> None:
    outputs, targets = random_outputs(7, 2), random_targets(8, [6, 3])
    found = [assign(outputs, targets, Config(assigner=name)).gt_index for name in ("paa", "atss", "hard_iou")]  # type: ignore[arg-type]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("changes", [{}, {"quality": "none"}, {"assigner": "atss"}, {"assigner": "hard_iou"}])
@pytest.mark.parametrize("profile", ["ours", "mmdet", "official"])
def test_no_object_gives_a_box_loss_of_zero(profile: Any, changes: dict[str, Any]) -> None:
    config = Config(profile=profile, **changes)
    outputs = random_outputs(9, 2)
    outputs.deltas.requires_grad_()
    if config.quality == "none":
        outputs = outputs._replace(quality_logits=None)
    losses = compute_losses(outputs, random_targets(10, [0, 0]), 1, 1, config=config)
    assert losses["loss_box"].item() == 0
    assert losses["positives"].item() == 0
    assert all(bool(term.isfinite()) for term in losses.values())
    losses["loss_box"].backward()


def test_model_without_the_branch() -> None:
    config = Config(backbone="resnet18", channels=64, quality="none", score_voting=False)
    model = PAA(config, 3).eval()
    assert not any(name.startswith("head.quality") for name in model.state_dict())
    sizes = torch.tensor([[64, 64]])
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), sizes)
    assert outputs.quality_logits is None
    detections = detect(outputs._replace(logits=outputs.logits + 4), sizes, config)  # scores are class scores
    torch.testing.assert_close(detections.scores.max(), (outputs.logits + 4).sigmoid().max())

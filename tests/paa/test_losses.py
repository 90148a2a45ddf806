"""PAA's loss against both originals, by hand, and at its edges."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.anchors import anchor_grid, level_shapes
from core.boxes import box_iou
from core.geometry import GEOMETRIES, LEGACY
from core.losses import giou_loss
from core.types import BACKGROUND, IGNORED, Assignment, Targets
from paa.assigner import Details
from paa.config import Config
from paa.losses import assign, assigned_losses, compute_losses, normalisers
from paa.model import Outputs
from paa.profiles import PAA_PROFILES
from tests.conftest import golden_arrays
from tests.core.operators import Recorder
from tests.paa.golden import (
    MMDET,
    OFFICIAL,
    check_losses,
    check_parameter_gradients,
    mmdet_head,
    mmdet_names,
    official_arrays,
    official_head,
    official_names,
)


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_golden_mmdet(case: str) -> None:
    names = {"loss_cls": "cls", "loss_box": "bbox", "loss_iou": "iou"}
    check_losses(golden_arrays("head_paa.npz"), case, MMDET, names)


@pytest.mark.parametrize("case", ["A", "B", "C", "D", "E", "F"])
def test_golden_official(shared: Path, case: str) -> None:
    names = {"loss_cls": "cls", "loss_box": "reg", "loss_iou": "iou_pred"}
    check_losses(official_arrays(shared), case, OFFICIAL, names)


def test_golden_mmdet_parameter_gradients() -> None:
    arrays = golden_arrays("head_paa.npz")
    check_parameter_gradients(arrays, MMDET, mmdet_head(arrays), mmdet_names(arrays))


def test_golden_official_parameter_gradients(shared: Path) -> None:
    arrays = official_arrays(shared)
    check_parameter_gradients(arrays, OFFICIAL, official_head(arrays), official_names(arrays))


def tiny(config: Config, gt_index: list[int], num_classes: int = 2) -> tuple[Outputs, Targets, Assignment]:
    """One image of 32 x 32 with zero outputs: 16 + 4 + 1 + 1 + 1 anchors; the first of them are assigned as told."""
    grid = anchor_grid(level_shapes((32, 32)), GEOMETRIES[config.geometry])
    anchors = len(grid.boxes)
    outputs = Outputs(torch.zeros(1, anchors, num_classes), torch.zeros(1, anchors, 4), torch.zeros(1, anchors), grid)
    boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0], [4.0, 4.0, 20.0, 28.0]]])
    targets = Targets(boxes, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[32, 32]]))
    index = torch.full((1, anchors), BACKGROUND)
    index[0, : len(gt_index)] = torch.tensor(gt_index)
    labels = torch.where(index >= 0, targets.labels[0][index.clamp(min=0)], index)
    return outputs, targets, Assignment(index, labels)


def test_terms_by_hand() -> None:
    # The first anchor is [-32, -32, 32, 32] and learns [0, 0, 32, 32]: IoU 1024 / 4096 = 0.25 is its weight and target;
    # GIoU loss 1 - 0.25 = 0.75, since the enclosing box is the anchor. One positive, so the box loss is 1.3 * 0.75.
    # IoU loss 0.5 * BCE(0, 0.25) = 0.5 ln 2. Focal, 23 anchors of 2 classes at logit 0: one positive element
    # 0.25 * 0.25 * ln 2 = 0.0433217, 45 negative ones 0.75 * 0.25 * ln 2 = 0.1299651.
    config = Config()
    losses = assigned_losses(*tiny(config, [0]), config)
    assert float(losses["loss_box"]) == pytest.approx(1.3 * 0.75, abs=1e-5)
    assert float(losses["loss_iou"]) == pytest.approx(0.5 * np.log(2), abs=1e-6)
    assert float(losses["loss_cls"]) == pytest.approx(0.0433217 + 45 * 0.1299651, rel=1e-6)


def test_box_loss_is_weighted_by_iou() -> None:
    # Spec check 9: IoUs .5 and .8 with GIoU losses .6 and .25 give 1.3 * (.5 * .6 + .8 * .25) / 1.3 = 0.5.
    config = Config()
    outputs, targets, assignment = tiny(config, [0, 1])
    losses = assigned_losses(outputs, targets, assignment, config)
    anchors, boxes = outputs.grid.boxes[:2], targets.boxes[0]
    ious, giou = box_iou(anchors, boxes), giou_loss(anchors, boxes)
    assert float(losses["loss_box"]) == pytest.approx(float(1.3 * (ious * giou).sum() / ious.sum()), rel=1e-5)


def test_normalisers_by_hand() -> None:
    # The three IoUs sum to 0.875; without positives the divisor is 1, and 1e-6 where the IoUs are summed.
    config = Config()
    assignment = tiny(config, [0, 1, 1])[2]
    ious = torch.tensor([[0.5, 0.25, 0.125] + [0.0] * 20])
    count, iou_sum = normalisers(assignment, ious, config)
    assert (float(count), float(iou_sum)) == (3.0, 0.875)
    count, iou_sum = normalisers(tiny(config, [])[2], ious * 0, config)
    assert (float(count), float(iou_sum)) == (1.0, pytest.approx(1e-6))


@pytest.mark.parametrize(
    ("profile", "mine", "other", "count", "iou_sum"),
    [
        ("ours", 3, 5, 4, 0.9375),  # spec check 10: 3 and 5 positives on two ranks; IoU sums 0.875 and 1
        ("official", 3, 5, 4, 0.9375),
        ("mmdet", 3, 5, 3, 0.875),
        ("ours", 0, 0, 0.5, 5e-7),  # none anywhere: the floor of 1 is shared by the ranks ...
        ("official", 0, 0, 1, 1e-12),  # ... or each rank's own
    ],
)
def test_normalisers_of_two_ranks(
    monkeypatch: pytest.MonkeyPatch, profile: str, mine: int, other: int, count: float, iou_sum: float
) -> None:
    config = replace(Config(), profile=profile)  # type: ignore[arg-type]
    monkeypatch.setattr("paa.losses.world_size", lambda: 2)
    monkeypatch.setattr("paa.losses.sum_over_ranks", lambda sums: sums + torch.tensor([float(other), other / 5]))
    ious = torch.tensor([[0.5, 0.25, 0.125] + [0.0] * 20]) * (mine > 0)
    ours = normalisers(tiny(config, [0, 1, 1][:mine])[2], ious, config)
    assert [float(part) for part in ours] == pytest.approx([count, iou_sum])


def test_mmdet_counts_images() -> None:
    # Two images without positives: the class loss is divided by 2 in profile mmdet, by 1 in ours.
    outputs, targets, assignment = tiny(Config(), [])
    two = Outputs(*(torch.cat([part, part]) for part in outputs[:3]), outputs.grid)
    double = Assignment(*(torch.cat([part, part]) for part in assignment))
    pair = Targets(*(torch.cat([part, part]) for part in targets))
    ours = assigned_losses(two, pair, double, Config())["loss_cls"]
    theirs = assigned_losses(two, pair, double, MMDET)["loss_cls"]
    assert float(ours) == pytest.approx(2 * float(theirs), rel=1e-6)


def test_ignored_anchors_have_no_class_loss() -> None:
    config = Config()
    outputs, targets, assignment = tiny(config, [0])
    everything = torch.where(assignment.gt_index >= 0, 0, IGNORED)
    ignored = Assignment(everything, everything)
    losses = assigned_losses(outputs, targets, ignored, config)
    assert float(losses["loss_cls"]) == pytest.approx(
        0.0433217 + 0.1299651, rel=1e-5
    )  # only the positive's two classes


@pytest.mark.parametrize("objects", [0, 3])
@pytest.mark.parametrize("profile", ["ours", "mmdet", "official"])
def test_no_objects(profile: str, objects: int) -> None:
    # Spec check 11: box and IoU loss exactly 0 with a connected graph, class loss finite; G may be 0 or all padding.
    config = replace(Config(), profile=profile)  # type: ignore[arg-type]
    outputs, _, _ = tiny(config, [])
    leaves = [part.requires_grad_() for part in outputs[:3]]
    targets = Targets(
        torch.zeros(1, objects, 4),
        torch.zeros(1, objects, dtype=torch.int64),
        torch.zeros(1, objects, dtype=torch.bool),
        torch.tensor([[32, 32]]),
    )
    losses = compute_losses(outputs, targets, 1, 1, config=config)
    assert losses["loss_box"].item() == losses["loss_iou"].item() == 0
    sum(losses.values(), torch.zeros(())).backward()
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert float(leaves[1].grad.abs().sum()) == 0  # type: ignore[union-attr]


def test_half_precision_outputs_are_cast() -> None:
    config = Config()
    outputs, targets, _ = tiny(config, [])
    half = Outputs(*(part.bfloat16() for part in outputs[:3]), outputs.grid)
    losses = compute_losses(half, targets, 1, 1, config=config)
    full = compute_losses(outputs, targets, 1, 1, config=config)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[name])


def test_extreme_deltas_stay_finite() -> None:
    config = Config()
    outputs, targets, _ = tiny(config, [])
    for size in (1e4, -1e4):
        extreme = outputs._replace(deltas=torch.full_like(outputs.deltas, size).requires_grad_())
        losses = compute_losses(extreme, targets, 1, 1, config=config)
        sum(losses.values(), torch.zeros(())).backward()
        assert torch.isfinite(extreme.deltas.grad).all()  # type: ignore[arg-type]


@pytest.mark.compiled
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_assignment_and_losses_compile(backend: str) -> None:
    config = replace(Config(), topk=3)
    torch.manual_seed(0)
    outputs, targets, _ = tiny(config, [])
    outputs = outputs._replace(logits=torch.randn_like(outputs.logits), deltas=torch.randn_like(outputs.deltas) / 2)
    criterion = partial(compute_losses, config=config)
    expected = criterion(outputs, targets, 1, 10)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=False, backend=backend)(outputs, targets, 1, 10)
    for name, value in expected.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6)


def test_assignment_follows_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    outputs, targets, assignment = tiny(Config(), [0])

    def record(*args: Any, **options: Any) -> Details:
        seen.update(options)
        return Details(assignment, *[None] * 8)  # type: ignore[arg-type]

    monkeypatch.setattr("paa.losses.explain_assignment", record)
    assign(outputs, targets, Config(topk=3, prematch_iou=0.3, scheme="b", geometry="legacy", profile="official"))
    assert (seen["topk"], seen["threshold"], seen["scheme"]) == (3, 0.3, "b")
    assert (seen["geometry"], seen["profile"]) == (LEGACY, PAA_PROFILES["official"])
    assert (seen["clamp_both_sides"], seen["anchor_valid"]) == (False, None)
    assign(outputs, targets, Config())
    assert (seen["clamp_both_sides"], seen["anchor_valid"].shape) == (True, (1, 23))


@pytest.mark.parametrize("name", ["box_weight", "quality_weight"])
def test_weights_scale_their_terms(name: str) -> None:
    term = {"box_weight": "loss_box", "quality_weight": "loss_iou"}[name]
    case = tiny(Config(), [0])
    once = assigned_losses(*case, replace(Config(), **{name: 1.0}))  # type: ignore[arg-type]
    twice = assigned_losses(*case, replace(Config(), **{name: 2.0}))  # type: ignore[arg-type]
    assert {key: float(twice[key] / once[key]) for key in once} == {key: 1 + (key == term) for key in once}


def test_training_step_never_waits_for_the_device() -> None:
    outputs, targets, _ = tiny(Config(), [])
    outputs = outputs._replace(logits=torch.randn_like(outputs.logits).requires_grad_())
    with Recorder() as recorder:
        losses = compute_losses(outputs, targets, 1, 1, config=Config())
        torch.stack(list(losses.values())).sum().backward()
    assert recorder.waiting == []

"""TOOD's losses: worked numbers, the normaliser over ranks, phases, images without objects."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

import tood_tal.losses as losses_module
from core.anchors import anchor_grid, anchors_inside
from core.losses import centerness_target, giou_loss, one_hot_labels
from core.types import BACKGROUND, Assignment, Targets
from tests.core.operators import Recorder
from tests.tood_tal.test_assigner import TOY_BOXES, TOY_CENTRES, TOY_OBJECTS, TOY_SCORES, targets_of
from tood_tal.config import Config
from tood_tal.losses import Learned, assigned_losses, compute_losses, focal_loss_of_scores, learn, normalisers
from tood_tal.model import Outputs, build_head, run_head

GRID = anchor_grid(((8, 8), (4, 4), (2, 2), (1, 1), (1, 1)))
ATSS_RUN, TAL_RUN = Config(atss_share=1.0), Config(atss_share=0.0)


def random_outputs(seed: int, batch: int = 2, classes: int = 5, parallel: bool = False) -> Outputs:
    """Leaves of any head: boxes about the anchors."""
    random = torch.Generator().manual_seed(seed)
    count = len(GRID.points)
    logits = torch.randn(batch, count, classes, generator=random)
    strides = torch.tensor([8.0, 16, 32, 64, 128]).repeat_interleave(torch.tensor(GRID.level_sizes))[:, None]
    boxes = GRID.boxes / strides + torch.randn(batch, count, 4, generator=random)
    if parallel:
        logits = logits.requires_grad_()
        return Outputs(logits.sigmoid(), boxes.requires_grad_(), logits, None, GRID)
    return Outputs(logits.sigmoid().requires_grad_(), boxes.requires_grad_(), None, None, GRID)


def random_targets(seed: int, counts: tuple[int, ...] = (3, 1)) -> Targets:
    """Objects inside 64 x 64 pixels; the second image is 40 x 30."""
    random = torch.Generator().manual_seed(seed)
    most = max(counts)
    low = 40 * torch.rand(len(counts), most, 2, generator=random)
    boxes = torch.cat([low, low + 8 + 20 * torch.rand(len(counts), most, 2, generator=random)], dim=-1)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    labels = torch.randint(0, 5, (len(counts), most), generator=random) * valid
    sizes = torch.tensor([[64, 64], [40, 30]])[: len(counts)]
    return Targets(boxes * valid[..., None], labels, valid, sizes)


# classes


def test_focal_loss_worked() -> None:
    scores, label = torch.tensor([[0.6, 0.3]]), torch.tensor([0])
    first = focal_loss_of_scores(scores, label, torch.ones(1), weighted=True)
    assert float(first) == pytest.approx(0.0204330 + 0.0240756, rel=1e-5)
    second = focal_loss_of_scores(scores, label, torch.tensor([0.8]), weighted=False)
    assert float(second) == pytest.approx(0.0236767 + 0.0321007, rel=1e-5)
    background = focal_loss_of_scores(scores, torch.tensor([BACKGROUND]), torch.zeros(1), weighted=False)
    expected = -(0.36 * torch.tensor(0.4).log() + 0.09 * torch.tensor(0.7).log())
    torch.testing.assert_close(background[0], expected)


def focal_class_by_class(scores: Tensor, labels: Tensor, targets: Tensor, weighted: bool) -> Tensor:
    """The obvious twin: one row and class after the other."""
    total = scores.new_zeros(labels.shape)
    for row in range(len(labels)):
        for column in range(scores.shape[1]):
            p = scores[row, column]
            if labels[row] == column:
                q = targets[row]
                total[row] += (0.25 if weighted else 1.0) * (q - p).abs() ** 2 * binary_cross_entropy(p, q)
            else:
                zero = torch.zeros(())
                total[row] += (0.75 if weighted else 1.0) * p**2 * binary_cross_entropy(p, zero)
    return total


@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_equals_the_loop(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "CACHED_ROWS", 7)
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(20, 4, generator=random)
    scores[0, 0], scores[1, 1], scores[2] = 0.0, 1.0, 1.0
    labels = torch.randint(-2, 4, (20,), generator=random)
    labels[:3] = torch.tensor([0, 1, -1])
    targets = torch.ones(20) if weighted else torch.rand(20, generator=random)
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    mine = focal_loss_of_scores(ours, labels, targets, weighted)
    slow = focal_class_by_class(theirs, labels, targets, weighted)
    torch.testing.assert_close(mine, slow)
    mine.sum().backward()
    slow.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("config", [ATSS_RUN, TAL_RUN])
def test_logits_lose_what_scores_lose(config: Config) -> None:
    targets = random_targets(1)
    with_logits = random_outputs(2, parallel=True)
    with_scores = random_outputs(2)
    terms = [compute_losses(outputs, targets, 1, 10, config=config) for outputs in (with_logits, with_scores)]
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-4, atol=1e-6)


# whole terms


def toy_outputs() -> Outputs:
    """Spec section 9, check 10: six anchors of stride 8 in a row."""
    grid = anchor_grid(((1, 6), (1, 1), (1, 1), (1, 1), (1, 1)))
    grid = grid._replace(points=torch.cat([TOY_CENTRES, torch.full((4, 2), -50.0)]))
    boxes = torch.cat([TOY_BOXES / 8, torch.zeros(4, 4)])
    scores = torch.cat([TOY_SCORES, torch.zeros(4, 2)])
    return Outputs(scores[None], boxes[None], None, None, grid)


def test_toy_worked() -> None:
    terms = compute_losses(toy_outputs(), targets_of(TOY_OBJECTS, [0, 1]), 1, 1, config=replace(TAL_RUN, topk=3))
    assert float(terms["loss_cls"]) == pytest.approx(0.9303155, rel=1e-5)
    assert float(terms["loss_box"]) == pytest.approx(0.0857700, rel=1e-5)
    assert float(terms["positives"]) == 5


def losses_anchor_by_anchor(outputs: Outputs, targets: Targets, learned: Learned, by_atss: bool) -> dict[str, float]:
    """Both terms of one process, one anchor after the other (spec section 2.6)."""
    classes = boxes = class_sum = box_sum = 0.0
    strides = torch.tensor(GRID.strides).repeat_interleave(torch.tensor(GRID.level_sizes))
    inside = anchors_inside(GRID, targets.sizes)
    one_hot = one_hot_labels(learned.assignment.labels, outputs.scores.shape[-1])
    for image, anchor in inside.nonzero().tolist():
        p, hot = outputs.scores[image, anchor].detach(), one_hot[image, anchor]
        g = int(learned.assignment.gt_index[image, anchor])
        weight = 0.0
        if g >= 0:
            box, gt = outputs.boxes[image, anchor].detach(), targets.boxes[image, g]
            weight = float(learned.box_weights[image, anchor])
            if by_atss:
                assert weight == pytest.approx(float(centerness_target(GRID.points[anchor], gt)))
            boxes += 2 * weight * float(giou_loss(box, gt / strides[anchor], 1e-6, floor=True))
        target = hot if by_atss else hot * weight
        entropy = binary_cross_entropy(p, target, reduction="none")
        factor = torch.where(hot > 0, 0.25, 0.75) if by_atss else torch.ones_like(p)
        classes += float((factor * (target - p).abs() ** 2 * entropy).sum())
        class_sum += float(g >= 0) if by_atss else weight
        box_sum += weight
    return {"loss_cls": classes / max(class_sum, 1), "loss_box": boxes / max(box_sum, 1)}


@pytest.mark.parametrize("by_atss", [False, True])
def test_terms_equal_the_loop_over_anchors(by_atss: bool) -> None:
    config = ATSS_RUN if by_atss else TAL_RUN
    for seed in range(4):
        outputs, targets = random_outputs(seed), random_targets(seed + 50)
        learned = learn(outputs, targets, by_atss, config)
        assert learned.assignment.positive.any()
        terms = assigned_losses(outputs, targets, learned, by_atss, config)
        for name, value in losses_anchor_by_anchor(outputs, targets, learned, by_atss).items():
            assert float(terms[name].detach()) == pytest.approx(value, rel=1e-4), name


def test_parallel_atss_learns_centreness() -> None:
    config = Config(head="parallel", quality="centerness", atss_share=1.0)
    targets = random_targets(3)
    quality = torch.randn(2, len(GRID.points)).requires_grad_()
    outputs = random_outputs(4, parallel=True)._replace(quality=quality)
    terms = compute_losses(outputs, targets, 1, 10, config=config)
    learned = learn(outputs, targets, True, config)
    positive = learned.assignment.positive
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        quality[positive], learned.box_weights[positive], reduction="sum"
    )
    torch.testing.assert_close(terms["loss_centerness"], expected / positive.sum())
    terms["loss_centerness"].backward()
    assert quality.grad is not None
    assert not quality.grad[~positive].any()


# phases


def test_phases_assign_differently_and_switch_with_the_step() -> None:
    outputs, targets, config = random_outputs(1), random_targets(2), Config()
    found = [compute_losses(outputs, targets, step, 12, config=config)["loss_cls"] for step in (1, 4, 5, 12)]
    by_atss, by_tal = (compute_losses(outputs, targets, 1, 1, config=c)["loss_cls"] for c in (ATSS_RUN, TAL_RUN))
    assert by_atss != by_tal
    assert found == [by_atss, by_atss, by_tal, by_tal]


@pytest.mark.parametrize("profile", ["ours", "mmdet", "official"])
def test_padding_counts_only_in_the_authors_second_phase(profile: str) -> None:
    config = replace(TAL_RUN, profile=profile)  # type: ignore[arg-type]
    outputs, targets = random_outputs(5), random_targets(6)
    inside = anchors_inside(GRID, targets.sizes)
    assert not inside.all()
    assert torch.equal(learn(outputs, targets, True, config).takes_part, inside)
    counts = learn(outputs, targets, False, config).takes_part
    assert torch.equal(counts, torch.ones_like(inside) if profile == "official" else inside)


def test_the_configuration_reaches_the_assignment() -> None:
    outputs, targets = random_outputs(5), random_targets(6, (6, 6))
    plain = learn(outputs, targets, False, TAL_RUN)
    for changes in ({"alpha": 2.0}, {"beta": 1.0}, {"topk": 2}, {"conflict": "min_area"}):
        other = learn(outputs, targets, False, replace(TAL_RUN, **changes))  # type: ignore[arg-type]
        assert not torch.equal(plain.class_targets, other.class_targets), changes
    by_atss = [learn(outputs, targets, True, replace(ATSS_RUN, atss_topk=k)).assignment.gt_index for k in (9, 3)]
    assert not torch.equal(*by_atss)


# normalisers


@pytest.mark.parametrize(
    ("profile", "ranks", "total", "expected"),
    [
        ("ours", 2, 2.4, 1.2),  # 2.0 and 0.4 on the ranks
        ("mmdet", 2, 2.4, 1.2),
        ("official", 2, 2.4, 1.2),
        ("ours", 1, 0.25, 1.0),
        ("mmdet", 1, 0.25, 1.0),
        ("official", 1, 0.25, 0.25),
        ("official", 1, 0.0, 1.0),
        ("ours", 4, 2.0, 0.5),  # the whole batch's sum is above the floor
        ("mmdet", 4, 2.0, 1.0),  # the average is not
        ("ours", 4, 0.5, 0.25),
        ("official", 4, 0.0, 1.0),
    ],
)
def test_normaliser_worked(
    profile: str, ranks: int, total: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_module, "sum_over_ranks", lambda sums: torch.full_like(sums, total))
    monkeypatch.setattr(losses_module, "world_size", lambda: ranks)
    config = Config(profile=profile)  # type: ignore[arg-type]
    found = normalisers((torch.zeros(()), torch.zeros(())), config)
    assert [float(part) for part in found] == pytest.approx([expected, expected])


# extremes


@pytest.mark.parametrize("config", [ATSS_RUN, TAL_RUN])
@pytest.mark.parametrize("head", ["t_head", "parallel", "parallel_tap"])
def test_no_objects(head: str, config: Config) -> None:
    config = replace(config, head=head, channels=64)  # type: ignore[arg-type]
    network = build_head(config, 5)
    maps = [torch.randn(2, 64, *shape) for shape in GRID.shapes]
    targets = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0).long(), torch.zeros(2, 0).bool(), torch.full((2, 2), 64))
    terms = compute_losses(run_head(network, maps, 8.0), targets, 1, 2, config=config)
    assert terms["loss_cls"] > 0
    assert terms["loss_box"] == 0
    (terms["loss_cls"] + terms["loss_box"]).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_scores_that_underflow_have_finite_gradients() -> None:
    config = replace(TAL_RUN, channels=64)
    network = build_head(config, 5)
    assert network.cls_logits.bias is not None
    torch.nn.init.constant_(network.cls_logits.bias, -300.0)
    maps = [torch.randn(2, 64, *shape) for shape in GRID.shapes]
    for phase in (ATSS_RUN, TAL_RUN):
        outputs = run_head(network, maps, 8.0)
        assert not outputs.scores.any()
        terms = compute_losses(outputs, random_targets(3), 1, 2, config=replace(phase, channels=64))
        (terms["loss_cls"] + terms["loss_box"]).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_saturated_scores_and_inside_out_boxes_are_finite() -> None:
    outputs, targets = random_outputs(1), random_targets(2)
    scores = outputs.scores.detach().round().requires_grad_()
    boxes = outputs.boxes.detach().flip(-1).requires_grad_()
    outputs = outputs._replace(scores=scores, boxes=boxes)
    for config in (ATSS_RUN, replace(TAL_RUN, profile="official")):
        terms = compute_losses(outputs, targets, 1, 1, config=config)
        (terms["loss_cls"] + terms["loss_box"]).backward()
        for leaf in (scores, boxes):
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()


def test_boxes_without_weight_may_be_infinite() -> None:
    outputs, targets = random_outputs(1), random_targets(2)
    for config in (ATSS_RUN, TAL_RUN):
        learned = learn(outputs, targets, config is ATSS_RUN, config)
        boxes = outputs.boxes.detach().masked_fill(~learned.assignment.positive[..., None], torch.inf)
        leaf = boxes.requires_grad_()
        terms = assigned_losses(outputs._replace(boxes=leaf), targets, learned, False, config)
        terms["loss_box"].backward()
        assert terms["loss_box"].isfinite()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_inside_out_positive_encloses_what_its_corners_do() -> None:
    # spec section 9, check 8: 1.5, where raising the corners would give 1.967
    count = len(GRID.points)
    outputs, targets = random_outputs(1, batch=1), targets_of(torch.tensor([[0.0, 0, 8, 8]]), [0])
    boxes = outputs.boxes.detach().clone()
    boxes[0, 0] = torch.tensor([6.0, 5, 2, 1])
    owner = torch.full((1, count), BACKGROUND)
    owner[0, 0] = 0
    weights = (owner == 0).float()
    learned = Learned(Assignment(owner, owner), weights, weights, owner == 0)
    config = replace(TAL_RUN, profile="official")
    terms = assigned_losses(outputs._replace(boxes=boxes), targets, learned, False, config)
    assert float(terms["loss_box"]) == pytest.approx(2 * 1.5, rel=1e-5)


def test_giou_of_inside_out_boxes_worked() -> None:
    # spec section 9, check 8, in the order: apart in one side, apart, inside out in both, inside out in one
    boxes = torch.tensor([[2.0, 1, 4, 3], [0, 0, 1, 1], [6, 5, 2, 1], [4, 1, 2, 3]])
    objects = torch.tensor([[2.0, 1, 5, 3], [2, 0, 3, 1], [0, 0, 1, 1], [2, 1, 4, 3]])
    torch.testing.assert_close(
        giou_loss(boxes, objects, 1e-6, floor=True), torch.tensor([1 / 3, 4 / 3, 1.5, 1.0]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("config", [ATSS_RUN, TAL_RUN])
def test_nothing_waits_for_the_device(config: Config) -> None:
    outputs, targets = random_outputs(1), random_targets(2)
    with Recorder() as recorder:
        compute_losses(outputs, targets, 1, 2, config=config)
    assert not recorder.waiting


def test_negatives_of_positive_anchors_count() -> None:
    # one anchor, positive for class 0 with t-hat .5, score .5: what is left is class 1's loss as a negative
    assignment = Assignment(torch.zeros(1, 1).long(), torch.zeros(1, 1).long())
    scores = torch.tensor([[[0.5, 0.4]]])
    loss = focal_loss_of_scores(scores, assignment.labels, torch.full((1, 1), 0.5), weighted=False)
    assert float(loss) == pytest.approx(-0.16 * float(torch.tensor(0.6).log()), rel=1e-5)

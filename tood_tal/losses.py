"""TOOD's training losses: outputs and targets to a dict of scalars (section 3.2.2; spec section 2.6)."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from core.anchors import anchor_strides, anchors_inside
from core.atss import assign_atss
from core.distributed import sum_over_ranks, world_size
from core.losses import (
    centerness_target,
    giou_loss,
    one_hot_labels,
    quality_focal_loss,
    summed_focal_loss,
)
from core.types import Assignment, Targets
from tood_tal.assigner import assign_aligned
from tood_tal.config import Config
from tood_tal.model import Outputs

BOX_WEIGHT = 2.0  # of GIoU (authors' code)
ALPHA, GAMMA = 0.25, 2.0  # of the focal losses (section 4.1)
GIOU_EPS = 1e-6  # square strides, floor of union and enclosing area
CACHED_ROWS = 4096  # of scores, worked on together on a CPU: 80 classes of them are 1.3 MB


class Learned(NamedTuple):
    """What every anchor learns in a step."""

    assignment: Assignment
    class_targets: Float[Tensor, "B A"]  # score of the anchor's class: 1 with ATSS, t-hat with TAL; 0 for negatives
    box_weights: Float[Tensor, "B A"]  # centre-ness with ATSS, t-hat with TAL; 0 for negatives
    takes_part: Bool[Tensor, "B A"]  # anchors that the class loss counts


def compute_losses(outputs: Outputs, targets: Targets, step: int, steps: int, *, config: Config) -> dict[str, Tensor]:
    """Assignment and loss terms, in float32 also under autocast.

    Args:
        outputs: of the model.
        targets: padded objects.
        step: of the run, counted from 1: the first part of the run assigns by ATSS, the rest by TAL (spec section 2.2).
        steps: length of the run.
        config: head, assignment, phases, profile.

    Returns:
        Terms whose names begin with loss, and for the log `positives`, the number of positives of an image.
    """
    by_atss = config.assigns_by_atss(step, steps)
    return assigned_losses(outputs, targets, learn(outputs, targets, by_atss, config), by_atss, config)


def learn(outputs: Outputs, targets: Targets, by_atss: bool, config: Config) -> Learned:
    """What the anchors learn, by ATSS (first phase) or by TAL."""
    inside = anchors_inside(outputs.grid, targets.sizes)
    if by_atss:
        return learn_by_atss(outputs, targets, inside, config)
    found = assign_aligned(
        outputs.scores,
        pixel_boxes(outputs),
        outputs.grid.points,
        targets,
        alpha=config.alpha,
        beta=config.beta,
        topk=config.topk,
        conflict=config.conflict,
        anchor_valid=inside,
    )
    counts = torch.ones_like(inside) if config.rules.learn_padding else inside
    return Learned(found.assignment, found.targets, found.targets, counts)


def learn_by_atss(outputs: Outputs, targets: Targets, inside: Bool[Tensor, "B A"], config: Config) -> Learned:
    """ATSS's assignment of anchors, not of predictions; boxes weighted by centre-ness (spec sections 2.5, 2.6)."""
    grid = outputs.grid
    assignment, _ = assign_atss(grid, targets, config.box_geometry, config.atss_topk, inside)
    positive = assignment.positive
    centerness = centerness_target(grid.points, matched_boxes(outputs, targets, assignment)) * positive
    return Learned(assignment, positive.to(torch.float32), centerness, inside)


def assigned_losses(
    outputs: Outputs, targets: Targets, learned: Learned, by_atss: bool, config: Config
) -> dict[str, Tensor]:
    """The loss terms for a given assignment.

    Sums run over all anchors with weight 0 where a term does not apply, so that shapes are fixed and a batch without
    positives gives a box loss of exactly 0 with a connected graph.
    """
    assignment, weights = learned.assignment, learned.box_weights
    positive = assignment.positive
    class_divisor, box_divisor = normalisers((learned.class_targets.sum(), weights.sum()), config)
    strides = anchor_strides(outputs.grid)[:, None]
    matched = matched_boxes(outputs, targets, assignment) / strides
    boxes = torch.where(positive[..., None], outputs.boxes, matched)  # a stand-in keeps the gradient finite
    classes = class_loss(outputs, learned, by_atss) * learned.takes_part
    losses = {
        "loss_cls": classes.sum() / class_divisor,
        "loss_box": BOX_WEIGHT * (giou_loss(boxes, matched, GIOU_EPS, floor=True) * weights).sum() / box_divisor,
    }
    if outputs.quality is not None:
        branch = binary_cross_entropy_with_logits(outputs.quality.float(), weights, reduction="none") * positive
        losses["loss_centerness"] = branch.sum() / class_divisor
    return {**losses, "positives": positive.sum().to(torch.float32) / len(positive)}


def class_loss(outputs: Outputs, learned: Learned, by_atss: bool) -> Float[Tensor, "B A"]:
    """Focal loss (first phase) or task-aligned focal loss, summed over classes (section 3.2.2; spec section 2.6).

    Heads without alignment know their logits, which lose no precision near 0 and 1.
    """
    labels = learned.assignment.labels
    if outputs.logits is None:
        return focal_loss_of_scores(outputs.scores, labels, learned.class_targets, weighted=by_atss)
    if by_atss:
        return summed_focal_loss(outputs.logits, labels, ALPHA, GAMMA)
    soft = one_hot_labels(labels, outputs.logits.shape[-1]) * learned.class_targets[..., None]
    return quality_focal_loss(outputs.logits, soft, GAMMA).sum(dim=-1)


def focal_loss_of_scores(
    scores: Float[Tensor, "*n C"], labels: Int[Tensor, "*n"], targets: Float[Tensor, "*n"], weighted: bool
) -> Float[Tensor, "*n"]:
    """|q - p|^2 BCE(p, q) of each anchor's class and p^2 (-ln(1 - p)) of all others, summed (section 3.2.2).

    With targets of 1 and `weighted` it is the focal loss of the first phase.

    Args:
        scores: p in [0, 1]. Logarithms are bounded by -100, torch's rule, so 0 and 1 stay finite.
        labels: class of each anchor; below 0: none.
        targets: q in [0, 1] of that class.
        weighted: multiply the class's term by alpha and the others by 1 - alpha.
    """
    rows = scores.flatten(0, -2), labels.flatten(), targets.flatten()
    # A CPU is several times faster on pieces that stay in its cache; a GPU wants one piece.
    size = CACHED_ROWS if scores.device.type == "cpu" else max(1, len(rows[0]))
    pieces = zip(*(part.split(size) for part in rows), strict=True)
    own, other = (ALPHA, 1 - ALPHA) if weighted else (1.0, 1.0)
    return torch.cat([focal_piece(p, c, q, own, other) for p, c, q in pieces]).view(labels.shape)


def focal_piece(
    scores: Float[Tensor, "n C"], labels: Int[Tensor, " n"], targets: Float[Tensor, " n"], own: float, other: float
) -> Float[Tensor, " n"]:
    """`focal_loss_of_scores` of some rows: all classes as negatives but an anchor's own, which becomes a 0."""
    right, index = labels >= 0, labels.clamp(min=0)[:, None]
    score = scores.gather(-1, index)[:, 0]
    others = scores.scatter(-1, index, torch.where(right, 0.0, score)[:, None])
    negatives = others**GAMMA * NegativeEntropy.apply(others)
    positives = (targets - score).abs() ** GAMMA * binary_cross_entropy(score, targets, reduction="none")
    return other * negatives.sum(dim=-1) + own * positives * right


class NegativeEntropy(torch.autograd.Function):
    """-ln(1 - p), bounded by 100: torch's binary cross entropy with target 0, value and gradient.

    torch's own kernel takes both logarithms of every element one by one, on a CPU ten times as long.
    """

    @staticmethod
    def forward(scores: Tensor) -> Tensor:
        """The values."""
        return torch.log1p(-scores).clamp_(min=-100).neg_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keeps the scores."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """1 / (1 - p), the denominator bounded as torch bounds it."""
        (scores,) = ctx.saved_tensors
        return grad * scores / ((1 - scores) * scores).clamp(min=1e-12)


def pixel_boxes(outputs: Outputs) -> Float[Tensor, "B A 4"]:
    """Predicted boxes in pixels, unclipped."""
    return outputs.boxes * anchor_strides(outputs.grid)[:, None]


def matched_boxes(outputs: Outputs, targets: Targets, assignment: Assignment) -> Float[Tensor, "B A 4"]:
    """The object that each anchor learns, in pixels; the anchor itself where it learns none."""
    anchors = outputs.grid.boxes.expand(len(targets.boxes), -1, -1)
    if targets.boxes.shape[1] == 0:
        return anchors
    index = assignment.gt_index.clamp(min=0)[..., None].expand(-1, -1, 4)
    return torch.where(assignment.positive[..., None], targets.boxes.gather(1, index), anchors)


def normalisers(sums: tuple[Float[Tensor, ""], ...], config: Config) -> list[Float[Tensor, ""]]:
    """Divisors of the losses, for the gradient that DDP averages over ranks (spec section 2.6).

    `global` (ours): the sum over ranks is floored, then divided by the ranks, so that the gradient is that of one
    process with the whole batch. `average` (the authors, MMDetection): the average over ranks is floored. Every rank
    always takes part in the sum.
    """
    rules, ranks = config.rules, world_size()
    totals = sum_over_ranks(torch.stack(sums))
    share = ranks if rules.normaliser == "average" else 1
    averages = totals / share
    return list((torch.where(averages < rules.norm_floor, 1.0, averages) * share / ranks).unbind())

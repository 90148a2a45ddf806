"""The training losses of every host: outputs and targets to a dict of scalars (spec sections 2 and 5)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from core.anchors import anchor_strides, anchors_inside
from core.boxes import box_iou, distances_to_sides
from core.distributed import sum_over_ranks, world_size
from core.losses import (
    centerness_target,
    distribution_focal_loss,
    giou_loss,
    one_hot_labels,
    quality_focal_loss,
    quality_focal_loss_of_scores,
    sigmoid_focal_loss,
    varifocal_loss,
)
from core.types import BACKGROUND, IGNORED, Assignment, Targets
from dynamic_atss.assigner import assign_combined
from dynamic_atss.config import Config
from dynamic_atss.head import REG_MAX
from dynamic_atss.model import Outputs, decode, final_regression, float32_outputs, predicted_boxes

ATSS_BOX_WEIGHT = 2.0  # of GIoU (ATSS, appendix; authors' code)
GFL_BOX_WEIGHT, DFL_WEIGHT = 2.0, 0.25  # GFL, section 4
VFNET_FIRST_WEIGHT, VFNET_BOX_WEIGHT = 1.5, 2.0  # VFNet, Eq. 3
LARGEST_SIDE = REG_MAX - 0.1  # strides: a target of DFL needs a bin above it


def compute_losses(outputs: Outputs, targets: Targets, step: int, steps: int, *, config: Config) -> dict[str, Tensor]:
    """Assignment and the host's loss terms, in float32 also under autocast.

    Args:
        outputs: of the model.
        targets: padded objects.
        step: of the run, counted from 1: the weights of Table 3 may move with it.
        steps: length of the run.
        config: host, assignment, losses, profile.

    Returns:
        Terms whose names begin with loss, and for the log `positives`, the number of positives of an image, and
        `unmatched`, see `unmatched_fraction`.
    """
    outputs = float32_outputs(outputs)
    return assigned_losses(outputs, targets, assign(outputs, targets, step, steps, config), config)


def assign(outputs: Outputs, targets: Targets, step: int, steps: int, config: Config) -> Assignment:
    """Combined IoUs with the weights of this step; anchors in the padding are ignored if the profile says so."""
    pred_weight, anchor_weight = config.weights_at(step, steps)
    return assign_combined(
        outputs.grid,
        targets,
        predicted_boxes(outputs, config).detach(),
        geometry=config.box_geometry,
        pred_weight=pred_weight,
        anchor_weight=anchor_weight,
        k=config.topk,
        anchor_valid=anchors_inside(outputs.grid, targets.sizes) if config.switches.exclude_padding else None,
    )


def assigned_losses(outputs: Outputs, targets: Targets, assignment: Assignment, config: Config) -> dict[str, Tensor]:
    """The host's terms for a given assignment.

    Sums run over all anchors with weight 0 where a term does not apply, so that shapes are fixed and a batch without
    positives gives box losses of exactly 0 with a connected graph.
    """
    host = {"atss": atss_losses, "gfl": gfl_losses, "gflv2": gfl_losses, "vfnet": vfnet_losses}[config.host]
    positives = assignment.positive.sum().to(torch.float32) / len(assignment.positive)
    logged = {"positives": positives, "unmatched": unmatched_fraction(assignment, targets)}
    return {**host(outputs, targets, assignment, config), **logged}


def unmatched_fraction(assignment: Assignment, targets: Targets) -> Float[Tensor, ""]:
    """Objects of all ranks that no anchor learns, as a fraction of all, 0 where there is none (spec section 8).

    An object's threshold can exceed all of its candidates, or other objects win all that reach it.
    """
    learned = targets.valid.new_zeros(len(targets.valid), targets.valid.shape[1] + 1)
    learned = learned.scatter(1, assignment.gt_index.clamp(min=BACKGROUND) + 1, True)[:, 1:]
    counts = torch.stack([(targets.valid & ~learned).sum(), targets.valid.sum()])
    unmatched, objects = sum_over_ranks(counts.to(torch.float32)).unbind()
    return unmatched / objects.clamp(min=1)


def atss_losses(outputs: Outputs, targets: Targets, assignment: Assignment, config: Config) -> dict[str, Tensor]:
    """Classes, boxes and branch of the ATSS host (paper, section 3.3; spec section 2)."""
    assert outputs.quality is not None
    positive = assignment.positive
    boxes, matched = positive_boxes(outputs.regression, outputs, targets, assignment, config)
    ious = box_iou(boxes.detach(), matched, config.box_geometry) * positive
    branch = ious
    if config.quality == "centerness":
        branch = centerness_target(outputs.grid.points.expand_as(matched[..., :2]), matched) * positive
    count, weight_sum = divisors(assignment, (branch,), config)
    classes = class_loss(outputs.logits, ious, assignment, config.class_loss)
    cross_entropy = binary_cross_entropy_with_logits(outputs.quality, branch, reduction="none") * positive
    return {
        "loss_cls": (classes * takes_part(assignment, config)).sum() / count,
        "loss_box": ATSS_BOX_WEIGHT * (box_loss(boxes, matched, config) * branch).sum() / weight_sum,
        f"loss_{config.quality}": cross_entropy.sum() / count,
    }


def class_loss(
    logits: Float[Tensor, "B A C"], ious: Float[Tensor, "B A"], assignment: Assignment, kind: str
) -> Float[Tensor, "B A"]:
    """Focal, quality focal or varifocal loss summed over classes; the latter two learn the IoU (Table 1)."""
    classes = one_hot_labels(assignment.labels, logits.shape[-1])
    if kind == "focal":
        return sigmoid_focal_loss(logits, classes).sum(dim=-1)
    soft = classes * ious[..., None]
    if kind == "qfl":
        return quality_focal_loss(logits, soft).sum(dim=-1)
    return varifocal_loss(logits, soft, classes > 0).sum(dim=-1)


def gfl_losses(outputs: Outputs, targets: Targets, assignment: Assignment, config: Config) -> dict[str, Tensor]:
    """Joint scores, boxes and their distributions (GFL, Eq. 4 to 7; GFLV2, Eq. 3; spec section 5.1).

    A positive's boxes count as much as its largest class score, which is detached.
    """
    positive = assignment.positive
    boxes, matched = positive_boxes(outputs.regression, outputs, targets, assignment, config)
    ious = box_iou(boxes.detach(), matched) * positive
    soft = one_hot_labels(assignment.labels, outputs.logits.shape[-1]) * ious[..., None]
    scores = class_scores(outputs)
    weights = scores.detach().amax(dim=-1) * positive
    count, weight_sum = divisors(assignment, (weights,), config)
    if outputs.quality is None:
        classes = quality_focal_loss(outputs.logits, soft)
    else:
        classes = quality_focal_loss_of_scores(scores, soft)
    sides = distances_to_sides(outputs.grid.points, matched) / anchor_strides(outputs.grid)[:, None]
    bins = outputs.regression.unflatten(-1, (4, REG_MAX + 1))
    distribution = distribution_focal_loss(bins, sides.clamp(min=0, max=LARGEST_SIDE)).mean(dim=-1)
    return {
        "loss_cls": (classes.sum(dim=-1) * takes_part(assignment, config)).sum() / count,
        "loss_box": GFL_BOX_WEIGHT * (box_loss(boxes, matched, config) * weights).sum() / weight_sum,
        "loss_dfl": DFL_WEIGHT * (distribution * weights).sum() / weight_sum,
    }


def class_scores(outputs: Outputs) -> Float[Tensor, "B A C"]:
    """Class scores of the hosts without a root: GFLV2's are joined with the predicted quality (GFLV2, Eq. 3)."""
    scores = outputs.logits.sigmoid()
    return scores if outputs.quality is None else scores * outputs.quality.sigmoid()[..., None]


def vfnet_losses(outputs: Outputs, targets: Targets, assignment: Assignment, config: Config) -> dict[str, Tensor]:
    """IoU-aware classes, first and refined boxes, each weighted by its own IoU (VFNet, Eq. 2, 3; spec section 5.2)."""
    positive = assignment.positive
    first, matched = positive_boxes(outputs.regression, outputs, targets, assignment, config)
    refined, _ = positive_boxes(final_regression(outputs), outputs, targets, assignment, config)
    floor = config.rules.iou_floor
    first_ious, ious = (box_iou(boxes.detach(), matched).clamp(min=floor) * positive for boxes in (first, refined))
    count, first_sum, iou_sum = divisors(assignment, (first_ious, ious), config)
    classes = class_loss(outputs.logits, ious, assignment, "vfl")
    return {
        "loss_cls": (classes * takes_part(assignment, config)).sum() / count,
        "loss_first": VFNET_FIRST_WEIGHT * (box_loss(first, matched, config) * first_ious).sum() / first_sum,
        "loss_box": VFNET_BOX_WEIGHT * (box_loss(refined, matched, config) * ious).sum() / iou_sum,
    }


def box_loss(boxes: Float[Tensor, "B A 4"], matched: Float[Tensor, "B A 4"], config: Config) -> Float[Tensor, "B A"]:
    """GIoU loss with the profile's guard."""
    return giou_loss(boxes, matched, eps=config.rules.giou_eps, floor=config.rules.giou_floor)


def takes_part(assignment: Assignment, config: Config) -> Bool[Tensor, "B A"]:
    """Anchors that the class loss counts: all but the ignored ones, which VFNet learns as negatives."""
    used = assignment.labels != IGNORED
    return torch.ones_like(used) if config.rules.learn_padding else used


def positive_boxes(
    regression: Float[Tensor, "B A R"], outputs: Outputs, targets: Targets, assignment: Assignment, config: Config
) -> tuple[Float[Tensor, "B A 4"], Float[Tensor, "B A 4"]]:
    """Predicted boxes and the objects they learn; where an anchor learns none, both are finite stand-ins.

    The stand-in keeps every value and gradient finite where the weight is 0.
    """
    positive = assignment.positive[..., None]
    grid = outputs.grid
    boxes = decode(torch.where(positive, regression, 0.0), grid.boxes, grid.points, anchor_strides(grid), config)
    if targets.boxes.shape[1] == 0:
        return boxes, grid.boxes.expand_as(boxes)
    index = assignment.gt_index.clamp(min=0)[..., None].expand(-1, -1, 4)
    return boxes, torch.where(positive, targets.boxes.gather(1, index), grid.boxes)


def divisors(
    assignment: Assignment, weights: tuple[Float[Tensor, "B A"], ...], config: Config
) -> list[Float[Tensor, ""]]:
    """Number of positives, at least 1, then the sum of each kind of weight, for the gradient that DDP averages.

    `global` (ours): the sum over ranks is floored, then divided by the ranks, so that the gradient is that of one
    process with the whole batch. `average` (the authors, MMDetection): the average over ranks is floored. Every rank
    always takes part in the sum.
    """
    rules = config.rules
    counts = assignment.positive.sum(dim=1).to(torch.float32)
    if rules.count_empty_images:
        counts = counts.clamp(min=1)
    sums = sum_over_ranks(torch.stack([counts.sum(), *(weight.sum() for weight in weights)]))
    ranks = world_size()
    share = ranks if rules.normaliser == "average" else 1
    floors = (1.0, *(rules.weight_floor for _ in weights))
    return [total.clamp(min=share * floor) / ranks for total, floor in zip(sums.unbind(), floors, strict=True)]

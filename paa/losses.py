"""PAA's training loss: outputs and targets to a dict of scalars (Eq. 8; spec section 5)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from core.anchors import anchors_inside
from core.atss import assign_atss
from core.boxes import box_iou, decode_deltas
from core.distributed import sum_over_ranks, world_size
from core.losses import centerness_target, giou_loss, summed_focal_loss
from core.types import IGNORED, Assignment, Targets
from paa.assigner import Details, assign_hard_iou, explain_assignment
from paa.config import Config
from paa.model import Outputs


def compute_losses(outputs: Outputs, targets: Targets, step: int, steps: int, *, config: Config) -> dict[str, Tensor]:
    """Assignment and the three terms of Eq. 8, in float32 also under autocast.

    `step` and `steps` are part of every method's signature; PAA's loss is the same all through a run.
    """
    outputs = float32_outputs(outputs)
    return assigned_losses(outputs, targets, assign(outputs, targets, config), config)


def float32_outputs(outputs: Outputs) -> Outputs:
    """The outputs in float32: half precision would move assignments and lose small losses."""
    quality = None if outputs.quality_logits is None else outputs.quality_logits.float()
    return outputs._replace(logits=outputs.logits.float(), deltas=outputs.deltas.float(), quality_logits=quality)


def assign(outputs: Outputs, targets: Targets, config: Config) -> Assignment:
    """Algorithm 1 with the configuration's profile, or one of the assignments that the paper compares it with.

    Anchors in the padding of the batch are ignored if the profile says so.
    """
    if config.assigner == "atss":
        return assign_atss(outputs.grid, targets, config.box_geometry, config.topk, usable(outputs, targets, config))[0]
    if config.assigner == "hard_iou":
        return assign_hard_iou(outputs.grid, targets, config.box_geometry, usable(outputs, targets, config))
    return explain(outputs, targets, config).assignment


def explain(outputs: Outputs, targets: Targets, config: Config) -> Details:
    """Algorithm 1 with the configuration's profile, and every stage that led to its assignment."""
    return explain_assignment(
        outputs.logits,
        outputs.deltas,
        outputs.grid,
        targets,
        geometry=config.box_geometry,
        profile=config.rules,
        clamp_both_sides=config.switches.clamp_both_sides,
        topk=config.topk,
        threshold=config.prematch_iou,
        scheme=config.scheme,
        fixed_number=config.fixed_number,
        score_range=config.score_range,
        anchor_valid=usable(outputs, targets, config),
    )


def usable(outputs: Outputs, targets: Targets, config: Config) -> Bool[Tensor, "B A"] | None:
    """Anchors that take part; None: all of them."""
    return anchors_inside(outputs.grid, targets.sizes) if config.switches.exclude_padding else None


def assigned_losses(outputs: Outputs, targets: Targets, assignment: Assignment, config: Config) -> dict[str, Tensor]:
    """The terms of Eq. 8 for a given assignment, and the number of positives of an image for the log.

    Sums run over all anchors with weight 0 where a term does not apply, so that shapes are fixed and a batch without
    positives gives a box loss of exactly 0 with a connected graph.
    """
    positive = assignment.positive
    boxes, matched = positive_boxes(outputs, targets, assignment, config)
    weights = quality_targets(boxes.detach(), matched, outputs.grid.points, config) * positive
    count, weight_sum = normalisers(assignment, weights, config)
    class_count = count.clamp(min=len(positive)) if config.rules.count_images else count
    focal = summed_focal_loss(outputs.logits, assignment.labels) * (assignment.labels != IGNORED)
    giou = giou_loss(boxes, matched, eps=config.rules.giou_eps, floor=config.rules.giou_floor)
    losses = {
        "loss_cls": focal.sum() / class_count,
        "loss_box": config.box_weight * (giou * weights).sum() / weight_sum,
        "positives": positive.sum().to(focal.dtype) / len(positive),
    }
    if outputs.quality_logits is not None:
        cross_entropy = binary_cross_entropy_with_logits(outputs.quality_logits, weights, reduction="none") * positive
        losses[f"loss_{config.quality}"] = config.quality_weight * cross_entropy.sum() / count
    return losses


def quality_targets(
    boxes: Float[Tensor, "B A 4"], matched: Float[Tensor, "B A 4"], points: Float[Tensor, "A 2"], config: Config
) -> Float[Tensor, "B A"]:
    """What the quality branch learns, in [0, 1], and how much an anchor's box counts (Eq. 8; appendix A.1).

    The IoU of predicted box and object; ATSS's centre-ness of the anchor in the object; without the branch 1.
    """
    if config.quality == "iou":
        return box_iou(boxes, matched, config.box_geometry)
    if config.quality == "centerness":
        return centerness_target(points.expand_as(matched[..., :2]), matched)
    return torch.ones_like(boxes[..., 0])


def positive_boxes(
    outputs: Outputs, targets: Targets, assignment: Assignment, config: Config
) -> tuple[Float[Tensor, "B A 4"], Float[Tensor, "B A 4"]]:
    """Predicted boxes and the objects they learn; where an anchor learns none, both are the anchor itself.

    The stand-in keeps every value and gradient finite where the weight is 0.
    """
    positive = assignment.positive[..., None]
    anchors = outputs.grid.boxes
    deltas = torch.where(positive, outputs.deltas, 0.0)
    boxes = decode_deltas(anchors, deltas, config.box_geometry, config.switches.clamp_both_sides)
    if targets.boxes.shape[1] == 0:
        return boxes, anchors.expand_as(boxes)
    index = assignment.gt_index.clamp(min=0)[..., None].expand(-1, -1, 4)
    return boxes, torch.where(positive, targets.boxes.gather(1, index), anchors)


def normalisers(
    assignment: Assignment, weights: Float[Tensor, "B A"], config: Config
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Number of positives, at least 1, and the sum of their weights, for the gradient that DDP averages over ranks.

    `global` (ours): the sum over ranks is floored, then divided by the ranks, so that the gradient is that of one
    process with the whole batch, whatever the ranks. `average` (the authors): the average over ranks is floored; the
    same unless there are fewer positives than ranks. `local` (MMDetection): each rank's own (spec section 5). Without
    a quality branch all weights are 1 and both numbers are the same.
    """
    counts = assignment.positive.sum(dim=1).to(weights.dtype)
    if config.rules.count_empty_images:
        counts = counts.clamp(min=1)
    sums, ranks = torch.stack([counts.sum(), weights.sum()]), 1
    if config.rules.normaliser != "local":
        sums, ranks = sum_over_ranks(sums), world_size()
    share = ranks if config.rules.normaliser == "average" else 1
    count, weight_sum = sums.unbind()
    count = count.clamp(min=share) / ranks
    if config.quality == "none":
        return count, count
    return count, weight_sum.clamp(min=share * config.rules.box_normaliser_floor) / ranks

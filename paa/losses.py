"""PAA's training loss: outputs and targets to a dict of scalars (Eq. 8; spec section 5)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from core.anchors import anchors_inside
from core.boxes import box_iou, decode_deltas
from core.distributed import sum_over_ranks, world_size
from core.losses import giou_loss, one_hot_labels, sigmoid_focal_loss
from core.types import IGNORED, Assignment, Targets
from paa.assigner import assign_paa
from paa.config import Config
from paa.model import Outputs
from paa.profiles import PAA_PROFILES


def compute_losses(outputs: Outputs, targets: Targets, step: int, steps: int, *, config: Config) -> dict[str, Tensor]:
    """Assignment and the three terms of Eq. 8, in float32 also under autocast.

    `step` and `steps` are part of every method's signature; PAA's loss is the same all through a run.
    """
    outputs = float32_outputs(outputs)
    return assigned_losses(outputs, targets, assign(outputs, targets, config), config)


def float32_outputs(outputs: Outputs) -> Outputs:
    """The outputs in float32: half precision would move assignments and lose small losses."""
    return outputs._replace(
        logits=outputs.logits.float(), deltas=outputs.deltas.float(), quality_logits=outputs.quality_logits.float()
    )


def assign(outputs: Outputs, targets: Targets, config: Config) -> Assignment:
    """Algorithm 1 with the configuration's profile; anchors in the padding of the batch are ignored if it says so."""
    inside = anchors_inside(outputs.grid, targets.sizes) if config.switches.exclude_padding else None
    return assign_paa(
        outputs.logits,
        outputs.deltas,
        outputs.grid,
        targets,
        geometry=config.box_geometry,
        profile=PAA_PROFILES[config.profile],
        clamp_both_sides=config.switches.clamp_both_sides,
        topk=config.topk,
        threshold=config.prematch_iou,
        scheme=config.scheme,
        anchor_valid=inside,
    )


def assigned_losses(outputs: Outputs, targets: Targets, assignment: Assignment, config: Config) -> dict[str, Tensor]:
    """The three terms of Eq. 8 for a given assignment.

    Sums run over all anchors with weight 0 where a term does not apply, so that shapes are fixed and a batch without
    positives gives a box loss of exactly 0 with a connected graph.
    """
    positive = assignment.positive
    boxes, matched = positive_boxes(outputs, targets, assignment, config)
    profile = PAA_PROFILES[config.profile]
    ious = box_iou(boxes.detach(), matched, config.box_geometry) * positive
    count, iou_sum = normalisers(assignment, ious, config)
    class_count = count
    if profile.count_images:
        class_count = count.clamp(min=len(positive))
    classes = one_hot_labels(assignment.labels, outputs.logits.shape[-1])
    focal = sigmoid_focal_loss(outputs.logits, classes) * (assignment.labels != IGNORED)[..., None]
    giou = giou_loss(boxes, matched, eps=profile.giou_eps, floor=profile.giou_floor)
    cross_entropy = binary_cross_entropy_with_logits(outputs.quality_logits, ious, reduction="none") * positive
    return {
        "loss_cls": focal.sum() / class_count,
        "loss_box": config.box_weight * (giou * ious).sum() / iou_sum,
        "loss_iou": config.quality_weight * cross_entropy.sum() / count,
    }


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
    assignment: Assignment, ious: Float[Tensor, "B A"], config: Config
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Number of positives, at least 1, and the sum of their IoUs, for the gradient that DDP averages over ranks.

    `global` (ours): the sum over ranks is floored, then divided by the ranks, so that the gradient is that of one
    process with the whole batch, whatever the ranks. `average` (the authors): the average over ranks is floored; the
    same unless there are fewer positives than ranks. `local` (MMDetection): each rank's own (spec section 5).
    """
    profile = PAA_PROFILES[config.profile]
    sums, ranks = torch.stack([assignment.positive.sum().to(ious.dtype), ious.sum()]), 1
    if profile.normaliser != "local":
        sums, ranks = sum_over_ranks(sums), world_size()
    share = ranks if profile.normaliser == "average" else 1
    count, iou_sum = sums.unbind()
    return count.clamp(min=share) / ranks, iou_sum.clamp(min=share * profile.box_normaliser_floor) / ranks

"""The training losses: outputs and targets to a dict of scalars (paper, section 3.3; spec section 4.1)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from core.distributed import sum_over_ranks, world_size
from core.types import IGNORED, Assignment, Targets
from padet.assigner import filter_easy_negatives, match_anchors, mine_negatives
from padet.coder import encode
from padet.config import Config
from padet.model import Outputs, float32_outputs, promoted_anchors


def compute_losses(outputs: Outputs, targets: Targets, step: int, steps: int, *, config: Config) -> dict[str, Tensor]:
    """Both assignments and the loss terms, in float32 also under autocast.

    Args:
        outputs: of the model.
        targets: padded objects.
        step: of the run; nothing here depends on it.
        steps: length of the run.
        config: thresholds and ratios.

    Returns:
        Terms whose names begin with loss, and for the log, as means over images: positives and negatives of the initial
        anchors, and those that detection learns, of promoted anchors after theta's filter; the largest offset of FAM.
    """
    outputs = float32_outputs(outputs)
    initial, final = assign(outputs, targets, config)
    counts = divisors(initial, final)
    losses = {
        **apm_losses(outputs, targets, initial, counts[0], config),
        **detection_losses(outputs, targets, final, counts[1], config),
        **count_anchors(initial, "_initial"),
        **count_anchors(final, ""),
    }
    if outputs.offsets:
        losses["max_offset"] = largest_offsets(outputs.offsets).mean()
    return losses


def assign(outputs: Outputs, targets: Targets, config: Config) -> tuple[Assignment, Assignment]:
    """The matching of the initial anchors, and that of the promoted ones without easy negatives (section 3.1)."""
    thresholds = config.positive_iou, config.negative_iou
    initial = match_anchors(outputs.anchors.boxes, targets, *thresholds)
    final = initial
    if outputs.apm_deltas is not None:
        final = match_anchors(promoted_anchors(outputs), targets, *thresholds)
    if outputs.apm_logits is not None:
        final = filter_easy_negatives(final, outputs.apm_logits, config.theta)
    return initial, final


def divisors(initial: Assignment, final: Assignment) -> Float[Tensor, " 2"]:
    """N_apm and N_d: positives of the whole batch, at least 1, for the gradient that DDP averages (spec section 4.2).

    The sum over ranks is floored, then divided by the ranks, so that the gradient is that of one process with the whole
    batch. Every rank always takes part.
    """
    counts = torch.stack([stage.positive.sum().to(torch.float32) for stage in (initial, final)])
    return sum_over_ranks(counts).clamp(min=1) / world_size()


def apm_losses(
    outputs: Outputs, targets: Targets, assignment: Assignment, count: Float[Tensor, ""], config: Config
) -> dict[str, Tensor]:
    """APM's part of the loss: is an anchor positive, and where would it fit (spec section 4.1, first line)."""
    losses = {}
    if outputs.apm_logits is not None:
        losses["loss_apm_score"] = apm_score_loss(outputs.apm_logits, assignment, config.apm_neg_pos_ratio) / count
    if outputs.apm_deltas is not None:
        boxes = outputs.anchors.boxes.expand_as(outputs.apm_deltas)
        losses["loss_apm_box"] = box_loss(outputs.apm_deltas, boxes, targets, assignment) / count
    return losses


def detection_losses(
    outputs: Outputs, targets: Targets, assignment: Assignment, count: Float[Tensor, ""], config: Config
) -> dict[str, Tensor]:
    """The detection head's part of the loss: classes and final boxes (spec section 4.1, second line)."""
    return {
        "loss_class": class_loss(outputs.logits, assignment, config.neg_pos_ratio) / count,
        "loss_box": box_loss(outputs.deltas, promoted_anchors(outputs), targets, assignment) / count,
    }


def apm_score_loss(logits: Float[Tensor, "B A"], assignment: Assignment, ratio: float = 0.0) -> Float[Tensor, ""]:
    """Sum over positives and negatives of BCE(p, positive); with a ratio, over the hardest negatives only."""
    if ratio:
        assignment = mine_negatives(assignment, logits, ratio)
    losses = F.binary_cross_entropy_with_logits(logits, assignment.positive.to(logits.dtype), reduction="none")
    return losses.masked_fill(assignment.gt_index == IGNORED, 0.0).sum()


def class_loss(logits: Float[Tensor, "B A K"], assignment: Assignment, ratio: float = 0.0) -> Float[Tensor, ""]:
    """Sum over positives and negatives of the cross entropy of C + 1 classes; 0 is background.

    With a ratio, over the hardest negatives only: those of the lowest probability of background.
    """
    if ratio:
        assignment = mine_negatives(assignment, -logits.log_softmax(dim=-1)[..., 0], ratio)
    classes = assignment.labels + 1  # BACKGROUND is -1, IGNORED -2
    return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), ignore_index=IGNORED + 1, reduction="sum")


def box_loss(
    deltas: Float[Tensor, "B A 4"], references: Float[Tensor, "B A 4"], targets: Targets, assignment: Assignment
) -> Float[Tensor, ""]:
    """Sum over positives of smooth L1 (beta 1) between deltas and the object's, over four coordinates.

    The sum runs over all anchors with 0 where there is no positive, so that shapes are fixed and a batch without
    objects gives exactly 0 with a connected graph.
    """
    positive = assignment.positive[..., None]
    if targets.boxes.shape[1] == 0:
        return (deltas * 0.0).sum()
    index = assignment.gt_index.clamp(min=0)[..., None].expand(-1, -1, 4)
    unit = torch.arange(1.0, 5.0, device=deltas.device)  # any box with sides, where there is nothing to learn
    wanted = encode(*(torch.where(positive, boxes, unit) for boxes in (references, targets.boxes.gather(1, index))))
    return F.smooth_l1_loss(torch.where(positive, deltas, wanted), wanted, reduction="sum")


def largest_offsets(offsets: tuple[Float[Tensor, "B 18 _ _"], ...]) -> Float[Tensor, " B"]:
    """Each image's largest FAM offset over all levels, in cells: one that runs away samples nothing but zeros."""
    return torch.stack([level.detach().abs().flatten(1).amax(dim=1) for level in offsets]).amax(dim=0)


def count_anchors(assignment: Assignment, suffix: str) -> dict[str, Tensor]:
    """Positives and negatives of an image, as means over the batch (what Fig. 1 and 2 count)."""
    size = len(assignment.gt_index)
    negatives = (assignment.gt_index < 0) & (assignment.gt_index != IGNORED)
    return {
        f"positives{suffix}": assignment.positive.sum().to(torch.float32) / size,
        f"negatives{suffix}": negatives.sum().to(torch.float32) / size,
    }

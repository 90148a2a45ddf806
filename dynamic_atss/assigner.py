"""Which anchors are positive: ATSS's rule on Combined IoUs (paper, section 3; spec section 1).

The candidates are ATSS's, nearest anchors of every level. What they must reach, and what decides between objects, is
the sum of the anchor's IoU with the object and the IoU of the box that the network now predicts there. Predicted IoUs
are computed at the candidates only; no anchors x objects matrix is made.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from core.anchors import AnchorGrid
from core.atss import TOPK, adaptive_threshold, atss_candidates, labels_of, resolve_conflicts
from core.boxes import box_iou, centres_inside
from core.geometry import MODERN, Geometry
from core.types import IGNORED, Assignment, Targets


class Details(NamedTuple):
    """The assignment and what led to it; K is the number of candidates of an object, all levels together."""

    assignment: Assignment
    anchors: Int[Tensor, "B G K"]  # candidates; 0 where not valid
    valid: Bool[Tensor, "B G K"]
    anchor_ious: Float[Tensor, "B G K"]
    predicted_ious: Float[Tensor, "B G K"] | None  # None where they have no weight
    combined: Float[Tensor, "B G K"]  # Combined IoU, in [0, sum of the weights]
    thresholds: Float[Tensor, "B G"]
    positive: Bool[Tensor, "B G K"]  # wanted by the object, before conflicts between objects


def assign_combined(
    grid: AnchorGrid,
    targets: Targets,
    predicted: Float[Tensor, "B A 4"],
    *,
    geometry: Geometry = MODERN,
    pred_weight: float = 1.0,
    anchor_weight: float = 1.0,
    k: int = TOPK,
    anchor_valid: Bool[Tensor, "B A"] | None = None,
) -> Assignment:
    """Assign objects to anchors by Combined IoUs (paper, section 3.2).

    Args:
        grid: anchors of the batch's canvas.
        targets: padded objects; an image may have none.
        predicted: decoded, unclipped boxes of the same forward pass in pixels; no gradient flows through them.
        geometry: convention of all IoUs and of the anchors' centres.
        pred_weight: of the predicted IoU; 0 leaves it out altogether, which is ATSS.
        anchor_weight: of the anchor's IoU; 0 leaves it out.
        k: candidates per object and level.
        anchor_valid: see `core.atss.assign_atss`; anchors that are not become IGNORED.

    Returns:
        As ATSS: no anchor is forced upon an object that has none reaching its threshold.

    Raises:
        ValueError: if a weight is below 0, or both are 0.
    """
    return explain_assignment(
        grid,
        targets,
        predicted,
        geometry=geometry,
        pred_weight=pred_weight,
        anchor_weight=anchor_weight,
        k=k,
        anchor_valid=anchor_valid,
    ).assignment


@torch.no_grad()
def explain_assignment(
    grid: AnchorGrid,
    targets: Targets,
    predicted: Float[Tensor, "B A 4"],
    *,
    geometry: Geometry = MODERN,
    pred_weight: float = 1.0,
    anchor_weight: float = 1.0,
    k: int = TOPK,
    anchor_valid: Bool[Tensor, "B A"] | None = None,
) -> Details:
    """`assign_combined` with everything that led to the assignment; same arguments."""
    if pred_weight < 0 or anchor_weight < 0 or pred_weight + anchor_weight == 0:
        raise ValueError(f"weights must be at least 0 and not both 0, got {pred_weight} and {anchor_weight}")
    candidates = atss_candidates(grid, targets.boxes, targets.valid, geometry, k, anchor_valid)
    index, valid = candidates.anchor_index, candidates.valid
    objects = targets.boxes[:, :, None]
    anchor_ious = box_iou(grid.boxes[index], objects, geometry)
    predicted_ious = None
    if pred_weight > 0:
        predicted_ious = box_iou(_boxes_at(predicted, index), objects, geometry)
    combined = combined_iou(predicted_ious, anchor_ious, pred_weight, anchor_weight)
    thresholds = combined_threshold(predicted_ious, anchor_ious, valid, pred_weight, anchor_weight)
    inside = centres_inside(grid.points[index], objects)
    positive = valid & (combined >= thresholds[..., None]) & inside
    gt_index, _ = resolve_conflicts(index, positive, combined, len(grid.boxes))
    labels = labels_of(gt_index, targets.labels)
    if anchor_valid is not None:
        gt_index, labels = (part.masked_fill(~anchor_valid, IGNORED) for part in (gt_index, labels))
    return Details(
        Assignment(gt_index, labels), index, valid, anchor_ious, predicted_ious, combined, thresholds, positive
    )


def combined_iou(
    predicted_ious: Float[Tensor, "*n"] | None,
    anchor_ious: Float[Tensor, "*n"],
    pred_weight: float,
    anchor_weight: float,
) -> Float[Tensor, "*n"]:
    """Combined IoU of a pair: w_p * predicted IoU + w_a * anchor IoU (paper, section 3.2; Table 3), in float64.

    In float64, as the threshold is: a candidate that equals its threshold must not fall under it by rounding.
    """
    total = anchor_weight * anchor_ious.double()
    return total if predicted_ious is None else pred_weight * predicted_ious.double() + total


def combined_threshold(
    predicted_ious: Float[Tensor, "B G K"] | None,
    anchor_ious: Float[Tensor, "B G K"],
    valid: Bool[Tensor, "B G K"],
    pred_weight: float,
    anchor_weight: float,
) -> Float[Tensor, "B G"]:
    """What an object's candidates must reach (paper, Eq. 2 to 4): each kind of IoU has its own mean + deviation.

    w_p (m_p + s_p) + w_a (m_a + s_a): the sum of the deviations, which is at least the deviation of the sum, and
    deviations over n - 1. It can exceed all candidates; that object then has no positive.
    """
    threshold = anchor_weight * adaptive_threshold(anchor_ious, valid) if anchor_weight > 0 else 0.0
    if predicted_ious is None:
        assert isinstance(threshold, Tensor)
        return threshold
    return pred_weight * adaptive_threshold(predicted_ious, valid) + threshold


def _boxes_at(boxes: Float[Tensor, "B A 4"], index: Int[Tensor, "B G K"]) -> Float[Tensor, "B G K 4"]:
    """Each candidate's box."""
    flat = index.flatten(1)[..., None].expand(-1, -1, 4)
    return boxes.detach().gather(1, flat).unflatten(1, index.shape[1:])

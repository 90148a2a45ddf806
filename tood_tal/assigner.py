"""Task Alignment Learning: which anchors are positive, and how much (section 3.2; spec sections 2.3 and 2.4).

Stand-alone functions of scores, boxes, anchor centres and objects, for any one-stage head. An object takes the anchors
where its class score and the IoU of the predicted box are best together. All objects are compared with all anchors, a
fixed number of pairs at a time, so that neither time nor memory needs a matrix of all pairs.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from core.atss import labels_of, resolve_conflicts
from core.boxes import box_area, box_iou, centres_inside
from core.types import IGNORED, Assignment, Targets

TOPK = 13  # m, anchors offered to each object (section 4.3)
ALPHA, BETA = 1.0, 6.0  # exponents of score and IoU (Table 4)
EPSILON = 1e-7  # added to the largest metric that the others are divided by (authors' code)
CPU_PAIRS = 2**18  # (object, anchor) pairs worked on at once: a megabyte a plane, what a core's cache holds
GPU_PAIRS = 2**24  # and on a GPU: 64 MB a plane
BLOCK = 64  # anchors whose largest metric is looked for first


class AlignedAssignment(NamedTuple):
    """The assignment, and how well every anchor's prediction is aligned with its object."""

    assignment: Assignment
    metric: Float[Tensor, "B A"]  # t = score^alpha * IoU^beta with the anchor's object; 0 where it has none
    ious: Float[Tensor, "B A"]  # of the predicted box with the object; 0 where there is none
    targets: Float[Tensor, "B A"]  # normalised t, what the class score learns and what the losses are weighted with


class Details(NamedTuple):
    """The assignment and what led to it; K is the number of anchors offered to an object."""

    result: AlignedAssignment
    anchors: Int[Tensor, "B G K"]  # of largest metric, the best first
    metric: Float[Tensor, "B G K"]  # t of each pair; 0 for padding objects and anchors that may not be used
    ious: Float[Tensor, "B G K"]
    positive: Bool[Tensor, "B G K"]  # kept by the object: t above 0, centre inside; before conflicts between objects


def assign_aligned(
    scores: Float[Tensor, "B A C"],
    boxes: Float[Tensor, "B A 4"],
    centres: Float[Tensor, "A 2"],
    targets: Targets,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    topk: int = TOPK,
    conflict: str = "max_iou",
    anchor_valid: Bool[Tensor, "B A"] | None = None,
) -> AlignedAssignment:
    """Assign objects to anchors by their predictions (section 3.2.1).

    Args:
        scores: class scores in [0, 1]; no gradient flows through them, nor through the boxes.
        boxes: predicted, unclipped, in pixels; one turned inside out has no area.
        centres: of the anchors, (x, y) in pixels.
        targets: padded objects; an image may have none.
        alpha: exponent of the score, above 0.
        beta: exponent of the IoU, above 0.
        topk: anchors offered to each object, over all levels together; all where there are fewer.
        conflict: an anchor that several objects keep goes to the one of highest IoU (`max_iou`, the authors' code) or
            of smallest area (`min_area`, the paper's supplement); the first of equals.
        anchor_valid: False where an anchor takes no part (`core.anchors.anchors_inside`); those become IGNORED.

    Returns:
        The assignment. An object gets at most `topk` anchors and may get none: offered ones that it may not keep are
        not replaced. Equal metrics go by anchor index, so the result is the same on every device.

    Raises:
        ValueError: for an exponent that is not above 0, topk < 1, an unknown rule of conflict.
    """
    options = {"alpha": alpha, "beta": beta, "topk": topk, "conflict": conflict, "anchor_valid": anchor_valid}
    return explain_assignment(scores, boxes, centres, targets, **options).result  # type: ignore[arg-type]


@torch.no_grad()
def explain_assignment(
    scores: Float[Tensor, "B A C"],
    boxes: Float[Tensor, "B A 4"],
    centres: Float[Tensor, "A 2"],
    targets: Targets,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    topk: int = TOPK,
    conflict: str = "max_iou",
    anchor_valid: Bool[Tensor, "B A"] | None = None,
) -> Details:
    """`assign_aligned` with everything that led to the assignment; same arguments."""
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"alpha and beta must be above 0, got {alpha} and {beta}")
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    if conflict not in ("max_iou", "min_area"):
        raise ValueError(f"conflict must be max_iou or min_area, got {conflict!r}")
    boxes, scores = boxes.detach(), scores_by_class(scores.detach())
    usable = boxes if anchor_valid is None else boxes.masked_fill(~anchor_valid[..., None], 0)  # overlaps nothing
    anchors, metric = best_aligned(scores, usable, targets, alpha, beta, min(topk, len(centres)))
    objects = targets.boxes[:, :, None]
    ious = box_iou(rows_at(boxes, anchors), objects)
    positive = (metric > 0) & centres_inside(centres[anchors], objects)
    quality = ious if conflict == "max_iou" else box_area(objects.double()).reciprocal().expand(ious.shape)
    gt_index, _ = resolve_conflicts(anchors, positive, quality, len(centres))
    labels = labels_of(gt_index, targets.labels)
    if anchor_valid is not None:
        gt_index, labels = (part.masked_fill(~anchor_valid, IGNORED) for part in (gt_index, labels))
    flat = anchors.flatten(1)
    own = gt_index.gather(1, flat).view_as(anchors) == numbers_like(anchors)
    parts = (metric * own, ious * own, normalized_metric(metric, ious, own))
    spread = (part.new_zeros(gt_index.shape).scatter_reduce(1, flat, part.flatten(1), "amax") for part in parts)
    result = AlignedAssignment(Assignment(gt_index, labels), *spread)
    return Details(result, anchors, metric, ious, positive)


def scores_by_class(scores: Float[Tensor, "B A C"]) -> Float[Tensor, "B C A"]:
    """Scores class by class in float32 or better."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).transpose(1, 2)


def best_aligned(
    scores: Float[Tensor, "B C A"],
    boxes: Float[Tensor, "B A 4"],
    targets: Targets,
    alpha: float,
    beta: float,
    count: int,
) -> tuple[Int[Tensor, "B G K"], Float[Tensor, "B G K"]]:
    """The `count` anchors of largest metric of every object and their metrics (spec section 2.3, steps 1 to 3).

    Args:
        scores: class by class.
        boxes: predicted, in pixels.
        targets: padded objects; padding has metric 0 everywhere.
        alpha: exponent of the score.
        beta: exponent of the IoU.
        count: K, at most A.

    Returns:
        Anchors by falling metric, equal ones by index; where fewer than `count` are above 0 the rest have metric 0.
    """
    spare = -scores.shape[2] % BLOCK  # anchors without area behind the others, so that `largest` need not copy
    scores = torch.nn.functional.pad(scores, (0, spare)).contiguous()
    batch, classes, size = scores.shape
    number = targets.boxes.shape[1]
    objects = targets.boxes.to(scores.dtype).masked_fill(~targets.valid[..., None], 0)  # padding overlaps nothing
    corners = torch.nn.functional.pad(boxes.to(scores.dtype).transpose(1, 2), (0, spare)).contiguous()
    chunk = max(1, (GPU_PAIRS if scores.is_cuda or torch.compiler.is_compiling() else CPU_PAIRS) // (batch * size))
    anchors, metrics = [], []
    for first in range(0, max(number, 1), chunk):
        part = slice(first, first + chunk)
        rows = targets.labels[:, part] + classes * torch.arange(batch, device=scores.device)[:, None]
        own = scores.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
        metric = alignment_metric(own, corners, objects[:, part], alpha, beta)
        values, index = largest(metric, count)
        anchors.append(index)
        metrics.append(values)
    return torch.cat(anchors, dim=1), torch.cat(metrics, dim=1)


def alignment_metric(
    scores: Float[Tensor, "B g A"],
    corners: Float[Tensor, "B 4 A"],
    objects: Float[Tensor, "B g 4"],
    alpha: float,
    beta: float,
) -> Float[Tensor, "B g A"]:
    """t = s^alpha * u^beta of all pairs (section 3.2.1), u the IoU of box and object, as `core.boxes.box_iou` has it.

    Args:
        scores: of each object's class.
        corners: x1, y1, x2, y2 of the predicted boxes, each a plane of its own.
        objects: boxes.
        alpha: exponent of the score.
        beta: exponent of the IoU.
    """
    left, top, right, bottom = corners[:, None].unbind(2)
    width = torch.minimum(right, objects[..., 2:3]).sub_(torch.maximum(left, objects[..., 0:1])).clamp_(min=0)
    height = torch.minimum(bottom, objects[..., 3:4]).sub_(torch.maximum(top, objects[..., 1:2])).clamp_(min=0)
    intersection = width.mul_(height)
    area = (right - left).clamp_(min=0) * (bottom - top).clamp_(min=0)
    union = (area + box_area(objects)[..., None].clamp(min=1e-6)).sub_(intersection)
    return power(scores, alpha) * power(intersection.div_(union), beta)


def power(values: Float[Tensor, "*n"], exponent: float) -> Float[Tensor, "*n"]:
    """values ** exponent, by squaring where the exponent is whole: torch's own takes ten times as long."""
    if exponent != int(exponent) or exponent > 64:
        return values**exponent
    result, square, left = None, values, int(exponent)
    while True:
        if left % 2:
            result = square if result is None else result * square
        left //= 2
        if not left:
            assert result is not None
            return result
        square = square * square


def largest(values: Float[Tensor, "B g A"], count: int) -> tuple[Float[Tensor, "B g K"], Int[Tensor, "B g K"]]:
    """The `count` largest of each row and their places, equal ones by place; values must be at least 0.

    The places lie in the `count` blocks with the largest maxima: whatever another block holds has that many values in
    front of it. So most of the row is looked at once.
    """
    size = values.shape[-1]
    blocks = -(-size // BLOCK)
    if blocks <= count:
        return ranked(values, torch.arange(size, device=values.device).expand_as(values), count)
    padded = values
    if size < blocks * BLOCK:
        padded = torch.nn.functional.pad(values, (0, blocks * BLOCK - size), value=-1.0)
    maxima = padded.unflatten(-1, (blocks, BLOCK)).amax(dim=-1)
    _, best = ranked(maxima, torch.arange(blocks, device=values.device).expand_as(maxima), count)
    places = (best[..., None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(-2)
    return ranked(padded.gather(-1, places), places, count)


def ranked(
    values: Float[Tensor, "B g n"], places: Int[Tensor, "B g n"], count: int
) -> tuple[Float[Tensor, "B g K"], Int[Tensor, "B g K"]]:
    """The `count` largest values by (value, place): torch's topk leaves the order of equal ones open.

    Bits of floats that are at least 0 rank as whole numbers do, so value and place fit one number of 64 bits.
    """
    bits = values.float().view(torch.int32).long()
    keys = (bits << 32) - places
    chosen = keys.topk(count, dim=-1).indices
    return values.gather(-1, chosen), places.gather(-1, chosen)


def normalized_metric(
    metric: Float[Tensor, "B G K"], ious: Float[Tensor, "B G K"], own: Bool[Tensor, "B G K"]
) -> Float[Tensor, "B G K"]:
    """t scaled so that the largest of an object's positives equals the largest IoU of them (section 3.2.2).

    t / (max t + 1e-7) * max IoU; the two maxima may come from different anchors. 0 for others.
    """
    metric, ious = metric * own, ious * own
    return metric / (metric.amax(dim=-1, keepdim=True) + EPSILON) * ious.amax(dim=-1, keepdim=True)


def numbers_like(index: Int[Tensor, "B G K"]) -> Int[Tensor, "G 1"]:
    """The number of the object of each row."""
    return torch.arange(index.shape[1], device=index.device)[:, None]


def rows_at(boxes: Float[Tensor, "B A 4"], index: Int[Tensor, "B G K"]) -> Float[Tensor, "B G K 4"]:
    """Each pair's box."""
    return boxes.gather(1, index.flatten(1)[..., None].expand(-1, -1, 4)).unflatten(1, index.shape[1:])

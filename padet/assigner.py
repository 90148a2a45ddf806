"""Which anchors are positive, negative or ignored, initial and promoted ones alike (paper, section 3; spec 2.2).

Everything is batched over images and objects. The IoUs of all pairs are held once, (B, G, A); what computes them works
on a chunk of anchors at a time.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from core.atss import labels_of
from core.types import BACKGROUND, IGNORED, Assignment, Targets

FORCED_IOU = 1e-6  # an object has a best anchor only if their IoU is above it
# Pairs worked on at once. A CPU is several times faster on pieces that stay in its cache.
CPU_PAIRS, GPU_PAIRS = 2**20, 2**25


@torch.no_grad()
def match_anchors(
    boxes: Float[Tensor, "*#B A 4"], targets: Targets, positive_iou: float = 0.5, negative_iou: float = 0.3
) -> Assignment:
    """Match boxes to objects: the rule of both stages.

    1. Every object takes its best anchor, whatever their IoU above `FORCED_IOU`. Where two want the same one, pairs are
       taken by falling IoU and the other object takes the best anchor that is free.
    2. Every other anchor takes the object it overlaps most, if their IoU is `positive_iou` or more.
    3. Of the rest those whose largest IoU is below `negative_iou` are negative, the others ignored.

    Equal IoUs: the object that comes first wins an anchor, and an object takes the anchor that comes first.

    Args:
        boxes: initial anchors (A, 4), or promoted ones (B, A, 4); pixels, with sides above 0.
        targets: padded objects. An image without any has only negatives.
        positive_iou: smallest IoU of step 2.
        negative_iou: of step 3.

    Returns:
        Every object with an anchor above `FORCED_IOU` and one to spare has at least one positive.
    """
    batch, objects = targets.valid.shape
    if objects == 0:
        return Assignment(*(targets.labels.new_full((batch, boxes.shape[-2]), BACKGROUND) for _ in range(2)))
    present = torch.where(targets.valid[..., None], targets.boxes, 0.0)  # padding has no area and overlaps nothing
    ious, best, owner = pairwise_ious(boxes, present)
    gt_index = torch.where(best >= positive_iou, owner, torch.where(best < negative_iou, BACKGROUND, IGNORED))
    gt_index = give_anchors(gt_index, *best_free_anchors(ious))
    labels = labels_of(gt_index.clamp(min=BACKGROUND), targets.labels)
    return Assignment(gt_index, torch.where(gt_index == IGNORED, IGNORED, labels))


def pairwise_ious(
    boxes: Float[Tensor, "*#B A 4"], objects: Float[Tensor, "B G 4"]
) -> tuple[Float[Tensor, "B G A"], Float[Tensor, "B A"], Int[Tensor, "B A"]]:
    """IoUs of all pairs of an image, and of each anchor the largest one with the object it belongs to.

    Of objects with equal IoU the first is taken. G is at least 1.
    """
    (batch, count), anchors = objects.shape[:2], boxes.shape[-2]
    pairs = GPU_PAIRS if objects.is_cuda else CPU_PAIRS
    ious = objects.new_empty(batch, count, anchors)
    best = []
    for start in range(0, anchors, size := max(1, pairs // (batch * count))):
        chunk = slice(start, start + size)
        part = _chunk_ious(boxes[..., chunk, :], objects)
        best.append(part.max(dim=1))
        ious[..., chunk] = part
    values, owner = (torch.cat(parts, dim=-1) for parts in zip(*best, strict=True))
    return ious, values, owner


def _chunk_ious(boxes: Float[Tensor, "*#B n 4"], objects: Float[Tensor, "B G 4"]) -> Float[Tensor, "B G n"]:
    """IoUs of all pairs as `core.boxes.box_iou` has them, coordinate by coordinate and in place: there are many."""
    left, top, right, bottom = (corner.contiguous()[..., None, :] for corner in boxes.unbind(-1))
    x1, y1, x2, y2 = (corner.contiguous()[..., None] for corner in objects.unbind(-1))
    areas = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
    object_areas = ((x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)).clamp(min=1e-6)
    widths = torch.minimum(right, x2).sub_(torch.maximum(left, x1)).clamp_(min=0)
    heights = torch.minimum(bottom, y2).sub_(torch.maximum(top, y1)).clamp_(min=0)
    intersections = widths.mul_(heights)
    unions = torch.add(areas, object_areas, out=heights).sub_(intersections)
    return intersections.div_(unions)


def best_free_anchors(ious: Float[Tensor, "B G A"]) -> tuple[Int[Tensor, "B G"], Bool[Tensor, "B G"]]:
    """Each object's own anchor: pairs are taken by falling IoU, each object and each anchor once (spec section 2.2).

    In every round each object asks for its best anchor; of those that ask for the same one all but the best are turned
    away from it for good. This is deferred acceptance (Gale and Shapley 1962). Both sides rank pairs by the same IoU,
    equal ones by object and then by anchor, so the result is that of taking pairs one by one: after r rounds the first
    r pairs of that order stand, hence G rounds are enough. On a GPU that many are always run, since asking whether all
    is settled would wait for the device.

    Args:
        ious: of all pairs, G at least 1. Overwritten: pairs that were turned away become 0.

    Returns:
        An anchor for each object, and whether it has one with an IoU above `FORCED_IOU`.
    """
    count = ious.shape[1]
    first = torch.ones(count, count, dtype=torch.bool, device=ious.device).tril(-1)  # column's object comes first
    for _ in range(count):
        values, anchors = ious.max(dim=2)
        asks = values > FORCED_IOU
        rivals = (anchors[:, :, None] == anchors[:, None, :]) & asks[:, None, :]
        mine, other = values[:, :, None], values[:, None, :]
        refused = (rivals & ((other > mine) | ((other == mine) & first))).any(dim=2) & asks
        if not ious.is_cuda and not refused.any():
            break
        ious.scatter_(2, anchors[..., None], values.masked_fill(refused, 0.0)[..., None])
    return anchors, asks & ~refused


def give_anchors(
    gt_index: Int[Tensor, "B A"], anchors: Int[Tensor, "B G"], given: Bool[Tensor, "B G"]
) -> Int[Tensor, "B A"]:
    """The matching in which each object that is `given` its own anchor has it, whatever the anchor had before."""
    batch, count = anchors.shape
    objects = torch.arange(count, device=anchors.device).expand(batch, -1)
    spare = gt_index.shape[1] + objects  # one more column for each object that gets none
    padded = torch.cat([gt_index, torch.zeros_like(objects)], dim=1)
    return padded.scatter(1, torch.where(given, anchors, spare), objects)[:, : gt_index.shape[1]]


def filter_easy_negatives(assignment: Assignment, logits: Float[Tensor, "B A"], threshold: float) -> Assignment:
    """Ignore negatives whose APM score is below the threshold theta (paper, section 3.1); positives always stay.

    Args:
        assignment: of the promoted anchors.
        logits: of the APM score, before the sigmoid; they get no gradient.
        threshold: theta, 0.01 in the paper. A score equal to it stays.
    """
    easy = (assignment.gt_index == BACKGROUND) & (logits.detach().sigmoid() < threshold)
    return Assignment(*(part.masked_fill(easy, IGNORED) for part in assignment))


def mine_negatives(assignment: Assignment, losses: Float[Tensor, "B A"], ratio: float) -> Assignment:
    """Ignore all but the hardest negatives of each image, `ratio` for each of its positives (SSD, section 2.2).

    Args:
        assignment: of one stage.
        losses: of every anchor, were it negative; they get no gradient. Of equal ones the first anchors stay.
        ratio: negatives to a positive. An image without positives keeps none.
    """
    negative = assignment.gt_index == BACKGROUND
    hardness = losses.detach().masked_fill(~negative, -torch.inf)
    ranks = hardness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    dropped = negative & (ranks >= ratio * assignment.positive.sum(dim=1, keepdim=True))
    return Assignment(*(part.masked_fill(dropped, IGNORED) for part in assignment))

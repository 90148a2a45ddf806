"""Which anchors are positive, negative or ignored, initial and promoted ones alike (paper, section 3; spec 2.2).

Everything is batched over images and objects. IoUs are computed for a chunk of anchors at a time; only a GPU holds
those of all pairs, (B, G, A).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from core.atss import labels_of
from core.types import BACKGROUND, IGNORED, Assignment, Targets

FORCED_IOU = 1e-6  # an object has a best anchor only if their IoU is above it
# Pairs worked on at once. A CPU is several times faster on pieces that stay in its cache.
CPU_PAIRS, GPU_PAIRS = 2**17, 2**25
# Largest IoU and its anchor of each object, and which objects were turned away from it, to the next of both.
Ask = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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
    best, owner, values, anchors = best_pairs(boxes, present)
    gt_index = torch.where(best >= positive_iou, owner, torch.where(best < negative_iou, BACKGROUND, IGNORED))
    gt_index = give_anchors(gt_index, *best_free_anchors(values, anchors, asker(boxes, present)))
    labels = labels_of(gt_index.clamp(min=BACKGROUND), targets.labels)
    return Assignment(gt_index, torch.where(gt_index == IGNORED, IGNORED, labels))


def best_pairs(
    boxes: Float[Tensor, "*#B A 4"], objects: Float[Tensor, "B G 4"]
) -> tuple[Float[Tensor, "B A"], Int[Tensor, "B A"], Float[Tensor, "B G"], Int[Tensor, "B G"]]:
    """Largest IoU of each anchor and the object it belongs to, then of each object and the anchor it belongs to.

    Of equal IoUs the first is taken. G is at least 1.
    """
    of_anchors, of_objects = [], []
    for start, ious in chunks_of_ious(boxes, objects):
        of_anchors.append(ious.max(dim=1))
        values, anchors = ious.max(dim=2)
        of_objects.append((values, anchors + start))
    best, owner = (torch.cat(parts, dim=1) for parts in zip(*of_anchors, strict=True))
    values, anchors = (torch.stack(parts, dim=2) for parts in zip(*of_objects, strict=True))
    values, chunk = values.max(dim=2)
    return best, owner, values, anchors.gather(2, chunk[..., None])[..., 0]


def chunks_of_ious(
    boxes: Float[Tensor, "*#B A 4"], objects: Float[Tensor, "B G 4"]
) -> Iterator[tuple[int, Float[Tensor, "B G _"]]]:
    """IoUs of all objects with some anchors at a time, after the number of the first of them."""
    size = max(1, (GPU_PAIRS if objects.is_cuda else CPU_PAIRS) // objects[..., 0].numel())
    for start in range(0, boxes.shape[-2], size):
        yield start, _chunk_ious(boxes[..., start : start + size, :], objects)


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


def best_free_anchors(
    values: Float[Tensor, "B G"], anchors: Int[Tensor, "B G"], ask: Ask
) -> tuple[Int[Tensor, "B G"], Bool[Tensor, "B G"]]:
    """Each object's own anchor: pairs are taken by falling IoU, each object and each anchor once (spec section 2.2).

    In every round each object asks for its best anchor; of those that ask for the same one all but the best are turned
    away from it for good. This is deferred acceptance (Gale and Shapley 1962). Both sides rank pairs by the same IoU,
    equal ones by object and then by anchor, so the result is that of taking pairs one by one: after r rounds the first
    r pairs of that order stand, hence G rounds are enough. On a GPU that many are always run, since asking whether all
    is settled would wait for the device.

    Args:
        values: largest IoU of each object, G at least 1.
        anchors: which anchor that is.
        ask: what finds the next best anchor of those turned away.

    Returns:
        An anchor for each object, and whether it has one with an IoU above `FORCED_IOU`.
    """
    refused = turned_away(values, anchors)
    for _ in range(values.shape[1] - 1):
        if not values.is_cuda and not refused.any():
            break
        values, anchors = ask(values, anchors, refused)
        refused = turned_away(values, anchors)
    return anchors, (values > FORCED_IOU) & ~refused


def turned_away(values: Float[Tensor, "B G"], anchors: Int[Tensor, "B G"]) -> Bool[Tensor, "B G"]:
    """Which objects ask for an anchor that one with a larger IoU, or an equal one before them, asks for as well."""
    count = values.shape[1]
    first = torch.ones(count, count, dtype=torch.bool, device=values.device).tril(-1)  # column's object comes first
    asks = values > FORCED_IOU
    rivals = (anchors[:, :, None] == anchors[:, None, :]) & asks[:, None, :]
    mine, other = values[:, :, None], values[:, None, :]
    return (rivals & ((other > mine) | ((other == mine) & first))).any(dim=2) & asks


def asker(boxes: Float[Tensor, "*#B A 4"], objects: Float[Tensor, "B G 4"]) -> Ask:
    """How those turned away find their next anchor: a GPU holds all IoUs, a CPU computes theirs anew.

    On a CPU few are turned away, and fresh memory for all IoUs costs it more than the rest of matching.
    """
    if not objects.is_cuda:
        return partial(ask_anew, boxes, objects)
    return partial(ask_held, torch.cat([ious for _, ious in chunks_of_ious(boxes, objects)], dim=2))


def ask_held(
    ious: Float[Tensor, "B G A"],
    values: Float[Tensor, "B G"],
    anchors: Int[Tensor, "B G"],
    refused: Bool[Tensor, "B G"],
) -> tuple[Float[Tensor, "B G"], Int[Tensor, "B G"]]:
    """Best anchors, IoU first, in a matrix of IoUs. In it pairs that were turned away become 0."""
    ious.scatter_(2, anchors[..., None], values.masked_fill(refused, 0.0)[..., None])
    values, anchors = ious.max(dim=2)
    return values, anchors


def ask_anew(
    boxes: Float[Tensor, "*#B A 4"],
    objects: Float[Tensor, "B G 4"],
    values: Float[Tensor, "B G"],
    anchors: Int[Tensor, "B G"],
    refused: Bool[Tensor, "B G"],
) -> tuple[Float[Tensor, "B G"], Int[Tensor, "B G"]]:
    """The same from boxes. An object asks in the order of its pairs, so the next is the best behind its last."""
    values, anchors = values.clone(), anchors.clone()
    numbers = torch.arange(boxes.shape[-2], device=boxes.device)
    for part in refused.nonzero().split(max(1, CPU_PAIRS // len(numbers))):
        image, row = part.unbind(1)
        ious = _chunk_ious(boxes[image] if boxes.dim() == 3 else boxes, objects[image, row, None])[:, 0]
        last, place = values[image, row, None], anchors[image, row, None]
        behind = (ious < last) | ((ious == last) & (numbers > place))
        values[image, row], anchors[image, row] = ious.masked_fill_(~behind, 0.0).max(dim=1)
    return values, anchors


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

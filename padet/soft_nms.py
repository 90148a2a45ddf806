"""Soft-NMS (Bodla et al. 2017) of all classes of all images of a batch at once."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from core.boxes import box_area
from core.nms import Candidates, best_in_groups

Kernel = Literal["linear", "gaussian"]
ROUNDS = 32  # between two looks at which classes are done


def soft_nms(
    candidates: Candidates, kernel: Kernel, *, iou: float, sigma: float, floor: float, limit: int
) -> Candidates:
    """The best detections of every image with their lowered scores, by image, then by falling score.

    In each image and class: take the highest score, the first of equal ones, lower the scores of the rest by their IoU
    with it, and so on (Bodla et al., Fig. 2). All classes of all images take one box in each round. Scores only fall,
    so a class is done when its best is below the floor or below the `limit` best already taken of its image.

    Args:
        candidates: of a batch.
        kernel: `linear` multiplies by 1 - IoU where the IoU is above `iou`; `gaussian` by exp(-IoU^2 / `sigma`).
        iou: of the linear kernel.
        sigma: of the Gaussian.
        floor: lower scores are dropped.
        limit: detections of an image.
    """
    boxes, scores, labels, images = candidates
    final = torch.zeros_like(scores)
    members = group_members(images * (labels.amax() + 1) + labels if len(labels) else labels)
    remaining = torch.where(members >= 0, scores[members], 0.0) if len(labels) else scores.new_zeros(0, 0)
    while members.numel():
        values, picks = take_rounds(boxes[members], remaining, min(ROUNDS, members.shape[1]), kernel, iou, sigma)
        taken = members.gather(1, picks).clamp(min=0)  # a class that has nothing left takes something for 0
        final.scatter_reduce_(0, taken.flatten(), values.flatten(), "amax")
        needed = weakest_of_best(final, images, limit)[images[members[:, 0]]].clamp(min=floor)
        remaining = remaining.masked_fill(remaining < needed[:, None], 0.0)  # they lower none that counts
        alive = (remaining > 0).any(dim=1)
        members, remaining = without_taken(members[alive], remaining[alive])
    found = candidates._replace(scores=final).select(((final >= floor) & (final > 0)).nonzero()[:, 0])
    return found.select(best_in_groups(found.scores, found.images, limit))


def take_rounds(
    boxes: Float[Tensor, "m k 4"],
    remaining: Float[Tensor, "m k"],
    rounds: int,
    kernel: Kernel,
    iou: float,
    sigma: float,
) -> tuple[Float[Tensor, "m r"], Int[Tensor, "m r"]]:
    """Scores and columns of the boxes that each row takes in these rounds; `remaining` is lowered in place.

    A round is many small operations, so both axes of all boxes go through one.
    """
    planes = torch.stack([*boxes.unbind(-1), box_area(boxes).clamp(min=1e-12)])
    lows, highs, areas = planes[:2], planes[2:4], planes[4]
    taken = []
    for _ in range(rounds):
        taken.append(remaining.max(dim=1, keepdim=True))
        picks = taken[-1].indices
        remaining.scatter_(1, picks, 0.0)
        best = planes.gather(2, picks.expand(5, -1, -1))
        sides = torch.minimum(highs, best[2:4]).sub_(torch.maximum(lows, best[:2])).clamp_(min=0)
        intersections = sides[0].mul_(sides[1])
        ious = intersections.div_((areas + best[4]).sub_(intersections))
        lower(remaining, ious, kernel, iou, sigma)
    values, columns = zip(*taken, strict=True)
    return torch.cat(values, dim=1), torch.cat(columns, dim=1)


def lower(scores: Float[Tensor, "n k"], ious: Float[Tensor, "n k"], kernel: Kernel, iou: float, sigma: float) -> None:
    """Lower scores in place by their boxes' IoUs, overwritten, to the one just taken (Bodla et al., section 3)."""
    if kernel == "gaussian":
        scores.mul_(ious.square_().div_(-sigma).exp_())
    else:
        overlaps = F.threshold(ious, iou, 0.0, inplace=True)  # 0 where the IoU is not above `iou`
        scores.addcmul_(scores, overlaps, value=-1)


def group_members(groups: Int[Tensor, " n"]) -> Int[Tensor, "m k"]:
    """Indices of the members of every group that has any, in their order, padded with -1 behind."""
    order = groups.argsort(stable=True)
    _, rows, counts = torch.unique_consecutive(groups[order], return_inverse=True, return_counts=True)
    width = int(counts.max()) if len(counts) else 0
    members = groups.new_full((len(counts), width), -1)
    members[rows, torch.arange(len(order), device=groups.device) - (counts.cumsum(0) - counts)[rows]] = order
    return members


def weakest_of_best(scores: Float[Tensor, " n"], images: Int[Tensor, " n"], limit: int) -> Float[Tensor, " B"]:
    """The score at place `limit` of every image, 0 where fewer are above 0."""
    above, least = scores.nonzero()[:, 0], scores.new_zeros(int(images.max()) + 1)
    if len(above) < limit:
        return least
    kept = above[best_in_groups(scores[above], images[above], limit)]
    counts = torch.bincount(images[kept], minlength=len(least))
    return torch.where(counts == limit, scores[kept][counts.cumsum(0).clamp(min=1) - 1], least)


def without_taken(
    members: Int[Tensor, "n k"], remaining: Float[Tensor, "n k"]
) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"]]:
    """Both tables without the columns that no row needs any more; what a row has left stays in order."""
    left = remaining > 0
    width = int(left.sum(dim=1).max()) if len(left) else 0
    order = (~left).byte().argsort(dim=1, stable=True)[:, :width]
    return members.gather(1, order), remaining.gather(1, order)

"""Soft-NMS (Bodla et al. 2017) of all classes of all images of a batch at once."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
        left, top, right, bottom = corners = boxes[members].unbind(-1)
        planes = (*corners, (right - left) * (bottom - top))
        for _ in range(min(ROUNDS, members.shape[1])):
            values, picks = remaining.max(dim=1, keepdim=True)
            taken = members.gather(1, picks)[:, 0].clamp(min=0)  # a class that has nothing left takes something for 0
            final.scatter_reduce_(0, taken, values[:, 0], "amax")
            remaining.scatter_(1, picks, 0.0)
            remaining *= decay(_ious_with(picks, planes), kernel, iou, sigma)
        best, needed = remaining.amax(dim=1), weakest_of_best(final, images, limit)[images[members[:, 0]]]
        alive = (best > 0) & (best >= needed.clamp(min=floor))
        members, remaining = without_taken(members[alive], remaining[alive])
    kept = best_in_groups(final, images, limit)
    return candidates._replace(scores=final).select(kept[(final[kept] >= floor) & (final[kept] > 0)])


def decay(ious: Float[Tensor, "n k"], kernel: Kernel, iou: float, sigma: float) -> Float[Tensor, "n k"]:
    """Factor of the scores of boxes with these IoUs to the one just taken (Bodla et al., section 3)."""
    if kernel == "gaussian":
        return ious.square().div_(-sigma).exp_()
    return torch.where(ious > iou, 1 - ious, 1.0)


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
    above = scores.nonzero()[:, 0]
    kept = above[best_in_groups(scores[above], images[above], limit)]
    counts = torch.bincount(images[kept], minlength=int(images.max()) + 1)
    return torch.where(counts == limit, scores[kept][counts.cumsum(0).clamp(min=1) - 1], 0.0)


def without_taken(
    members: Int[Tensor, "n k"], remaining: Float[Tensor, "n k"]
) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"]]:
    """Both tables without the columns that no row needs any more; what a row has left stays in order."""
    left = remaining > 0
    width = int(left.sum(dim=1).max()) if len(left) else 0
    order = (~left).byte().argsort(dim=1, stable=True)[:, :width]
    return members.gather(1, order), remaining.gather(1, order)


def _ious_with(picks: Int[Tensor, "n 1"], planes: tuple[Float[Tensor, "n k"], ...]) -> Float[Tensor, "n k"]:
    """IoU of every box with the one its row picked, of corners and areas apart and in place."""
    left, top, right, bottom, areas = planes
    x1, y1, x2, y2, area = (plane.gather(1, picks) for plane in planes)
    widths = torch.minimum(right, x2).sub_(torch.maximum(left, x1)).clamp_(min=0)
    heights = torch.minimum(bottom, y2).sub_(torch.maximum(top, y1)).clamp_(min=0)
    intersections = widths.mul_(heights)
    unions = (areas + area).sub_(intersections)
    return intersections.div_(unions.clamp_(min=1e-12))

"""Non-maximum suppression over the images and classes of a batch.

Candidates of a batch are kept flat, one row for each (anchor, class) pair worth keeping, because their number differs
wildly between images; `to_detections` pads what is left. Every order is fixed: by image, then by falling score, equal
scores in the order of the input.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.ops import nms

from core.geometry import MODERN, Geometry
from core.types import Detections


class Candidates(NamedTuple):
    """Scored boxes of all images of a batch, one class each."""

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]  # 0..C-1
    images: Int[Tensor, " n"]  # row of the batch

    def select(self, index: Int[Tensor, " m"]) -> "Candidates":
        """The candidates at `index`, in its order."""
        return Candidates(*(field[index] for field in self))


def best_in_groups(
    scores: Float[Tensor, " n"], groups: Int[Tensor, " n"], count: int, keep_ties: bool = False
) -> Int[Tensor, " m"]:
    """Indices of the `count` highest scores of every group, by group, then by falling score.

    Args:
        scores: to rank by; equal ones rank in the order of the input.
        groups: which group each belongs to.
        count: how many to keep of each group, or all of a smaller one.
        keep_ties: also keep scores equal to the last one kept (spec PAA section 6, step 4).

    Raises:
        ValueError: if count < 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    ranked, starts = scores[order], _group_starts(groups[order])
    keep = torch.arange(len(order), device=order.device) - starts < count
    if keep_ties:
        keep |= ranked >= ranked[(starts + count - 1).clamp(max=len(order) - 1)]
    return order[keep]


def level_groups(batch: int, level_sizes: Sequence[int], device: torch.device | None = None) -> Int[Tensor, "B A"]:
    """A number for each (image, level): groups for `best_in_groups`, levels from the finest.

    Args:
        batch: number of images.
        level_sizes: anchors of each level.
        device: of the result.
    """
    levels = torch.arange(len(level_sizes), device=device)
    level = levels.repeat_interleave(torch.tensor(level_sizes, device=device))
    return torch.arange(batch, device=device)[:, None] * len(level_sizes) + level


def chosen(index: Int[Tensor, " m"], shape: Sequence[int]) -> Bool[Tensor, "*n"]:
    """True at flat places of a shape; each may occur any number of times."""
    flat = torch.zeros(math.prod(shape), dtype=torch.bool, device=index.device)
    flat[index] = True
    return flat.view(*shape)


def _group_starts(sorted_groups: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Position of the first member of each element's group."""
    return torch.searchsorted(sorted_groups, sorted_groups)


def suppress(candidates: Candidates, iou_threshold: float, geometry: Geometry = MODERN) -> Int[Tensor, " m"]:
    """Indices that greedy NMS keeps: a box goes when its IoU with a better box of its image and class is > threshold.

    torchvision's NMS measures plain boxes: adding 1 to x2 and y2 makes its IoU the legacy one. Classes are moved apart
    by an offset, in float64: at 80 classes of 1333 pixels a float32 would be rounded to 1/128 pixel, IoUs with it. The
    number of calls differs by device, their arithmetic does not. On a GPU it is one call an image, because launches
    cost; on a CPU one call a class of an image, because the work grows with the square of what is compared: 5,000
    candidates of 80 classes take a fraction of the time of one call.
    """
    boxes, scores, labels, images = candidates
    if not len(boxes):
        return images
    corners = boxes.double()
    corners = torch.cat([corners[:, :2], corners[:, 2:] + geometry.plus_one], dim=1)
    corners = corners + (labels * (corners.max() - corners.min() + 1))[:, None]
    calls = images if boxes.is_cuda else images * (labels.max() + 1) + labels
    order = calls.argsort(stable=True)
    sizes = torch.unique_consecutive(calls[order], return_counts=True)[1].tolist()
    return torch.cat([part[nms(corners[part], scores[part].double(), iou_threshold)] for part in order.split(sizes)])


def nms_indices(
    candidates: Candidates,
    iou_threshold: float,
    max_detections: int,
    geometry: Geometry = MODERN,
    keep_ties: bool = False,
) -> Int[Tensor, " m"]:
    """Indices of an image's best detections after class-wise NMS, by image, then by falling score.

    Args:
        candidates: of the batch.
        iou_threshold: largest IoU with a better box of the same class and image.
        max_detections: of an image, all classes together.
        geometry: how the IoU measures boxes.
        keep_ties: also keep detections as good as the last one.
    """
    kept = suppress(candidates, iou_threshold, geometry).sort()[0]
    return kept[best_in_groups(candidates.scores[kept], candidates.images[kept], max_detections, keep_ties)]


def to_detections(candidates: Candidates, batch_size: int) -> Detections:
    """Padded detections from flat ones that are sorted by image and falling score.

    D is the largest number an image has; zero when no image has any.
    """
    boxes, scores, labels, images = candidates
    counts = torch.bincount(images, minlength=batch_size)
    width = int(counts.max()) if batch_size else 0
    row = images, torch.arange(len(images), device=images.device) - _group_starts(images)
    padded = Detections(
        boxes.new_zeros(batch_size, width, 4),
        scores.new_zeros(batch_size, width),
        labels.new_zeros(batch_size, width),
        torch.zeros(batch_size, width, dtype=torch.bool, device=boxes.device),
    )
    padded.boxes[row], padded.scores[row], padded.labels[row] = boxes, scores, labels
    padded.valid[row] = True
    return padded


def batched_nms(
    candidates: Candidates,
    batch_size: int,
    iou_threshold: float,
    max_detections: int,
    geometry: Geometry = MODERN,
) -> Detections:
    """Class-wise NMS of a whole batch and the best `max_detections` of each image, padded, by falling score."""
    kept = nms_indices(candidates, iou_threshold, max_detections, geometry)
    return to_detections(candidates.select(kept), batch_size)

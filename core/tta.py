"""Test-time augmentation: an image at several scales, as it is and mirrored, and the merge of what is found in each.

A method's own post-processing runs on every view of an image. What it finds goes back to the pixels of the first view,
the plain one, and `merge` joins what agrees (spec PAA section 7). `core.inference.detect_table` runs these parts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from core.boxes import box_area, box_iou
from core.geometry import MODERN, Geometry
from core.nms import Candidates, best_in_groups, suppress, to_detections
from core.types import Detections

PAPER_SIDE = 800  # pixels; short side of the models that the authors' views were made for
MERGE_IOU = 0.66  # boxes that overlap a better one by this or more are taken for the same object
SOFT_SCORE = 0.05  # lowest score that a member of a group keeps as a detection of its own
MAX_DETECTIONS = 1000  # of an image after merging; COCO's evaluation looks at 100 of each class

# The authors' scales beside the plain one: short side, limit of the long side, and which boxes are believed there:
# those whose area lies strictly between the squares of two lengths. All pixels are the view's own.
PAPER_SCALES = (
    (400, 1333, (96.0, 10000.0)),
    (500, 1333, (96.0, 10000.0)),
    (600, 1333, (64.0, 10000.0)),
    (640, 1333, (64.0, 10000.0)),
    (700, 1333, (64.0, 10000.0)),
    (900, 3000, (0.0, 10000.0)),
    (1000, 3000, (0.0, 10000.0)),
    (1100, 3000, (0.0, 256.0)),
    (1200, 3000, (0.0, 256.0)),
    (1300, 3000, (0.0, 192.0)),
    (1400, 3000, (0.0, 192.0)),
    (1800, 3000, (0.0, 96.0)),
)


class View(NamedTuple):
    """One way to look at an image."""

    short_side: int  # pixels; the image's short side is resized to it ...
    long_side: int  # ... unless its long side would exceed this
    flip: bool = False  # left and right exchanged
    window: tuple[float, float] | None = None  # only boxes with an area strictly between the squares of these, pixels

    @property
    def scale(self) -> tuple[int, int]:
        """Short side and limit of the long side."""
        return self.short_side, self.long_side


def paper_views(short_side: int, long_side: int) -> tuple[View, ...]:
    """The authors' 26 views: the plain one, 12 further scales, and each of them mirrored (spec PAA section 7).

    Deviation: they are made for 800/1333. For a model of another short side all further scales, limits and windows are
    multiplied by short_side / 800, so that objects are as large, relative to what the model learned, as in the paper's.

    Args:
        short_side: of the images that the model was trained on, pixels.
        long_side: limit of their long side; only the first two views have it.
    """
    ratio = short_side / PAPER_SIDE
    plain = View(short_side, long_side)
    scaled = [
        View(max(1, round(short * ratio)), max(1, round(long * ratio)), window=(low * ratio, high * ratio))
        for short, long, (low, high) in PAPER_SCALES
    ]
    return tuple(view._replace(flip=flip) for view in (plain, *scaled) for flip in (False, True))


def describe_views(views: Sequence[View]) -> str:
    """One line for the user: how many views there are, of which sizes, and how many pixels that is."""
    sides = [view.short_side for view in views]
    pixels = sum((side / sides[0]) ** 2 for side in sides)  # where no long side is limited
    return (
        f"test-time augmentation: {len(views)} views of each image, short sides {min(sides)} to {max(sides)} px, plain "
        f"and mirrored; {pixels:.0f} times the pixels of one"
    )


def flip_images(images: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> UInt8[Tensor, "B 3 H W"]:
    """Every image mirrored inside its own width; it stays at the left edge of the canvas, and padding where it is."""
    columns = torch.arange(images.shape[3], device=images.device)
    widths = sizes[:, 1:]
    source = torch.where(columns < widths, widths - 1 - columns, columns)  # (B, W)
    rows = torch.arange(len(images), device=images.device)[:, None]
    return images.transpose(1, 3)[rows, source].transpose(1, 3).contiguous()


def flip_boxes(
    boxes: Float[Tensor, "n 4"], widths: Int[Tensor, " n"], geometry: Geometry = MODERN
) -> Float[Tensor, "n 4"]:
    """Boxes of mirrored images of those widths: x becomes W - plus_one - x (spec PAA section 2)."""
    x1, y1, x2, y2 = boxes.unbind(1)
    far = widths - geometry.plus_one
    return torch.stack([far - x2, y1, far - x1, y2], dim=1)


def in_window(
    boxes: Float[Tensor, "n 4"], window: tuple[float, float] | None, geometry: Geometry = MODERN
) -> Int[Tensor, " m"]:
    """Rows of the boxes whose area lies strictly between the squares of the window's ends; all rows without one."""
    if window is None:
        return torch.arange(len(boxes), device=boxes.device)
    area = box_area(boxes, geometry)
    return ((area > window[0] ** 2) & (area < window[1] ** 2)).nonzero()[:, 0]


def view_candidates(
    detections: Detections,
    view: View,
    images: Int[Tensor, " B"],
    sizes: Int[Tensor, "B 2"],
    plain_sizes: Int[Tensor, "B 2"],
    geometry: Geometry = MODERN,
) -> Candidates:
    """What a view adds to the merge: its detections inside its window, in pixels of the plain view.

    Args:
        detections: of a batch, in pixels of this view.
        view: the batch's.
        images: which images of the plain batch these are.
        sizes: height and width of the images in this view.
        plain_sizes: height and width of the same images in the plain view.
        geometry: how the model measures boxes.

    Note: corners are multiplied by the ratio of the sizes in either geometry, as the authors do.
    """
    row = detections.valid.nonzero()[:, 0]
    found = Candidates(
        detections.boxes[detections.valid],
        detections.scores[detections.valid],
        detections.labels[detections.valid],
        images[row],
    )
    keep = in_window(found.boxes, view.window, geometry)
    found, row = found.select(keep), row[keep]
    boxes = flip_boxes(found.boxes, sizes[row, 1], geometry) if view.flip else found.boxes
    ratios = (plain_sizes / sizes)[row].flip(1).repeat(1, 2)  # x, y, x, y
    return found._replace(boxes=boxes * ratios)


def merge(found: Sequence[Candidates], batch_size: int, geometry: Geometry = MODERN) -> Detections:
    """The best 1000 detections of each image out of those of all its views, by falling score.

    Args:
        found: what each view adds, in pixels of the plain view; the order decides between equal scores.
        batch_size: number of images.
        geometry: how the IoU measures boxes.
    """
    pool = _concatenate(found)
    merged = [soft_vote(pool.select((pool.images == image).nonzero()[:, 0]), geometry) for image in range(batch_size)]
    pool = _concatenate([pool.select(pool.images[:0]), *merged])
    return to_detections(pool.select(best_in_groups(pool.scores, pool.images, MAX_DETECTIONS)), batch_size)


def vote(found: Candidates, geometry: Geometry = MODERN, threshold: float = MERGE_IOU) -> Candidates:
    """One box for each group of one image's detections: their mean, weighted by score, with the best one's score.

    The best box of a class takes all that overlap it by `threshold` or more, the best of the rest takes its own, and so
    on. A box alone in its group passes unchanged. Result by falling score.
    """
    found = _by_score(found)
    return _group_means(found, group_leaders(found, geometry, threshold))


def soft_vote(found: Candidates, geometry: Geometry = MODERN, threshold: float = MERGE_IOU) -> Candidates:
    """`vote`, and behind it the members of groups: detections that may be another object close by.

    Every member of a group of two or more stays where it is, with score * (1 - IoU with the group's best box), if that
    is at least 0.05; the best box itself, at IoU 1, never is. Arguments as of `vote`.
    """
    found = _by_score(found)
    leaders = group_leaders(found, geometry, threshold)
    ious = box_iou(found.boxes.double(), found.boxes[leaders].double(), geometry)
    scores = (found.scores.double() * (1 - ious)).to(found.scores.dtype)
    several = torch.bincount(leaders, minlength=len(leaders))[leaders] > 1
    members = (several & (scores >= SOFT_SCORE)).nonzero()[:, 0]
    return _concatenate([_group_means(found, leaders), found._replace(scores=scores).select(members)])


def _by_score(found: Candidates) -> Candidates:
    return found.select(found.scores.argsort(descending=True, stable=True))


def _group_means(found: Candidates, leaders: Int[Tensor, " n"]) -> Candidates:
    """The best box of each group, moved to its group's mean, in float64; where all scores are 0 it stays."""
    best, group, counts = leaders.unique(return_inverse=True, return_counts=True)
    weights = found.scores.double()[:, None]
    weighted = torch.zeros(len(best), 5, dtype=weights.dtype, device=weights.device)
    weighted.index_add_(0, group, torch.cat([found.boxes * weights, weights], dim=1))
    kept = found.select(best)
    moved = (counts > 1) & (weighted[:, 4] > 0)
    means = (weighted[:, :4] / weighted[:, 4:]).to(kept.boxes.dtype)
    return kept._replace(boxes=torch.where(moved[:, None], means, kept.boxes))


def group_leaders(found: Candidates, geometry: Geometry, threshold: float) -> Int[Tensor, " n"]:
    """The row of the best box of each box's group: for one that NMS keeps itself, else the first kept one to drop it.

    Args:
        found: one image's, by falling score.
        geometry: how the IoU measures boxes.
        threshold: smallest IoU that joins two boxes of a class; NMS drops above its own threshold, so it gets the next
            smaller number.
    """
    if not len(found.boxes):
        return found.images
    kept = suppress(found, math.nextafter(threshold, 0), geometry).sort()[0]
    kept = kept[found.labels[kept].argsort(stable=True)]  # by class, then by falling score
    first, last = (torch.searchsorted(found.labels[kept], found.labels, side=side) for side in ("left", "right"))
    place = first[:, None] + torch.arange(int((last - first).max()), device=first.device)
    better = kept[place.clamp(max=len(kept) - 1)]  # (n, kept boxes of the largest class)
    boxes = found.boxes.double()
    joined = (box_iou(boxes[:, None], boxes[better], geometry) >= threshold) & (place < last[:, None])
    leaders = better.gather(1, joined.int().argmax(dim=1, keepdim=True))[:, 0]
    return torch.where(joined.any(dim=1), leaders, torch.arange(len(boxes), device=boxes.device))


def _concatenate(parts: Sequence[Candidates]) -> Candidates:
    return Candidates(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

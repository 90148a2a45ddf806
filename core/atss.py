"""ATSS: which anchors are positive, from geometry alone (Zhang et al., CVPR 2020, Algorithm 1; arXiv 1912.02424).

Sparse: an object is compared with the cells of a small window around its centre on every level, never with all anchors.
The whole padded batch goes through at once. K is the number of candidates of one object, all levels together.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from core.anchors import AnchorGrid
from core.boxes import box_centres, box_iou, centres_inside
from core.geometry import Geometry
from core.types import BACKGROUND, IGNORED, Assignment, Targets

TOPK = 9  # candidates per object and level; ATSS section 3.3: results hardly depend on it from 7 to 17


class Candidates(NamedTuple):
    """Anchors that an object may learn from, level by level, the nearest first."""

    anchor_index: Int[Tensor, "B G K"]  # anchor 0..A-1; 0 where not valid
    valid: Bool[Tensor, "B G K"]  # False: padding object, or a level with fewer anchors than wanted


def assign_atss(
    grid: AnchorGrid,
    targets: Targets,
    geometry: Geometry,
    k: int = TOPK,
    anchor_valid: Bool[Tensor, "B A"] | None = None,
) -> tuple[Assignment, Float[Tensor, "B A"]]:
    """Assign objects to anchors (ATSS, Algorithm 1; spec PAA section 11).

    Args:
        grid: anchors of the batch's canvas.
        targets: padded ground truth; G may be 0.
        geometry: convention of the IoU and of the anchor centres, the one that `grid` was made with.
        k: candidates per object and level.
        anchor_valid: False where an anchor lies in its image's padding (`core.anchors.anchors_inside`); such anchors
            are no candidates and become IGNORED. None: all anchors take part.

    Returns:
        The assignment, and every positive anchor's IoU in (0, 1] with its object, 0 elsewhere. An object can end with
        no positive; no other match is forced upon it.
    """
    candidates = atss_candidates(grid, targets.boxes, targets.valid, geometry, k, anchor_valid)
    gt_boxes = targets.boxes[:, :, None]
    ious = box_iou(grid.boxes[candidates.anchor_index], gt_boxes, geometry)
    threshold = adaptive_threshold(ious, candidates.valid)
    inside = centres_inside(grid.points[candidates.anchor_index], gt_boxes)
    positive = candidates.valid & (ious >= threshold[..., None]) & inside
    gt_index, iou = resolve_conflicts(candidates.anchor_index, positive, ious, len(grid.boxes))
    labels = labels_of(gt_index, targets.labels)
    if anchor_valid is not None:
        gt_index, labels = (t.masked_fill(~anchor_valid, IGNORED) for t in (gt_index, labels))
    return Assignment(gt_index, labels), iou


def atss_candidates(
    grid: AnchorGrid,
    gt_boxes: Float[Tensor, "B G 4"],
    valid: Bool[Tensor, "B G"],
    geometry: Geometry,
    k: int = TOPK,
    anchor_valid: Bool[Tensor, "B A"] | None = None,
) -> Candidates:
    """The k anchors of every level nearest to each object's centre (ATSS, Algorithm 1, lines 3-6).

    Distance is Euclidean; equal distances go by anchor index. Levels with fewer anchors give all they have.

    Args:
        grid: anchors of the batch's canvas.
        gt_boxes: objects; their centres may lie outside the canvas.
        valid: False for padding objects.
        geometry: the convention that `grid` was made with.
        k: candidates per object and level.
        anchor_valid: True in a top-left rectangle of every image and level, as `core.anchors.anchors_inside` gives it.

    Raises:
        ValueError: if k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    centres = box_centres(gt_boxes).double()
    first, parts = 0, []
    for shape, stride in zip(grid.shapes, grid.strides, strict=True):
        size = shape[0] * shape[1]
        cells = _valid_cells(shape, None if anchor_valid is None else anchor_valid[:, first : first + size], gt_boxes)
        index, exists = nearest_cells(centres / stride - geometry.centre_offset, shape, cells, k)
        parts.append((index + first, exists & valid[..., None]))
        first += size
    index, exists = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return Candidates(index.masked_fill(~exists, 0), exists)


def nearest_cells(
    centres: Float[Tensor, "B G 2"], shape: tuple[int, int], cells: Int[Tensor, "B 2"], k: int
) -> tuple[Int[Tensor, "B G m"], Bool[Tensor, "B G m"]]:
    """The k cells of one level nearest to each centre, by (distance, index).

    Only the k columns and k rows nearest to the centre are looked at. That loses nothing: a cell of another column has
    k cells of its own row in front of it, and likewise for rows, wherever the centre lies.

    Args:
        centres: (x, y) in cells, so that cell (row i, column j) lies at (j, i); float64, where equal distances come out
            equal and different ones different.
        shape: height, width of the level.
        cells: columns, rows that each image covers; cells beyond are padding.
        k: number of cells wanted.

    Returns:
        Cell numbers, m = min(k, height * width) of them, and whether they exist in the image.
    """
    height, width = shape
    columns, column_gaps = _nearest_lines(centres[..., 0], min(k, width), cells[:, :1])
    rows, row_gaps = _nearest_lines(centres[..., 1], min(k, height), cells[:, 1:])
    distances = (row_gaps[..., :, None] + column_gaps[..., None, :]).flatten(2)
    distances, order = distances.sort(dim=-1, stable=True)
    distances, order = distances[..., :k], order[..., :k]
    row, column = order // columns.shape[-1], order % columns.shape[-1]
    return rows.gather(-1, row) * width + columns.gather(-1, column), distances.isfinite()


def adaptive_threshold(ious: Float[Tensor, "B G K"], valid: Bool[Tensor, "B G K"]) -> Float[Tensor, "B G"]:
    """IoU that an object's candidates must reach: mean + standard deviation (ATSS, Algorithm 1, lines 8-10).

    Returns:
        One float64 threshold per object, exact where all candidates have the same IoU. It can exceed all of them; that
        object then gets no positive. NaN, which no IoU reaches, for fewer than two candidates.

    Note: the paper leaves the estimator open; we divide by n - 1, as the authors' code does.
    """
    ious = ious.double().masked_fill(~valid, 0)
    count = valid.sum(dim=-1)
    mean = ious.sum(dim=-1) / count
    deviations = (ious - mean[..., None]).masked_fill(~valid, 0)
    return mean + (deviations.square().sum(dim=-1) / (count - 1)).sqrt()


def resolve_conflicts(
    index: Int[Tensor, "B G K"], positive: Bool[Tensor, "B G K"], quality: Float[Tensor, "B G K"], num_anchors: int
) -> tuple[Int[Tensor, "B A"], Float[Tensor, "B A"]]:
    """Give each anchor to the object of highest quality that wants it, the first of equals (ATSS, section 3.3).

    Args:
        index: candidate anchors of every object.
        positive: whether the object wants that anchor.
        quality: what decides between objects, here the IoU; at least 0.
        num_anchors: A.

    Returns:
        Object of each anchor, or BACKGROUND, and the quality of that pair, 0 for background. The same on every run:
        maxima and minima do not depend on the order of the scatter.
    """
    batch, objects, _ = index.shape
    names = torch.arange(objects, device=index.device)[:, None].expand_as(index).flatten(1)
    index, positive, quality = index.flatten(1), positive.flatten(1), quality.flatten(1)
    offered = quality.masked_fill(~positive, 0)
    best = offered.new_zeros(batch, num_anchors).scatter_reduce(1, index, offered, "amax")
    names = names.masked_fill(~positive | (quality < best.gather(1, index)), objects)
    gt_index = names.new_full((batch, num_anchors), objects).scatter_reduce(1, index, names, "amin")
    return gt_index.masked_fill(gt_index == objects, BACKGROUND), best


def labels_of(gt_index: Int[Tensor, "B A"], gt_labels: Int[Tensor, "B G"]) -> Int[Tensor, "B A"]:
    """Class of each anchor's object; BACKGROUND where it has none."""
    background = gt_labels.new_full((len(gt_labels), 1), BACKGROUND)
    return torch.cat([background, gt_labels], dim=1).gather(1, gt_index + 1)


def _valid_cells(shape: tuple[int, int], valid: Tensor | None, like: Tensor) -> Int[Tensor, "B 2"]:
    """Columns and rows of one level that each image covers, from the mask (B, height * width) of its valid anchors."""
    if valid is None:
        full = [torch.full((len(like), 1), side, device=like.device) for side in reversed(shape)]
        return torch.cat(full, dim=1)
    mask = valid.unflatten(1, shape)
    return torch.stack([mask[:, 0, :].sum(dim=1), mask[:, :, 0].sum(dim=1)], dim=1)


def _nearest_lines(
    centres: Float[Tensor, "B G"], count: int, available: Int[Tensor, "B 1"]
) -> tuple[Int[Tensor, "B G n"], Float[Tensor, "B G n"]]:
    """The `count` columns (or rows) nearest to each centre, rising, and their squared distances; inf: not there.

    The half-open interval [x - count/2, x + count/2) holds exactly those, the lower line of a pair at equal distance
    included; at the borders it moves inwards.
    """
    first = torch.minimum((centres - count / 2).ceil(), available - count).clamp(min=0)
    lines = first[..., None] + torch.arange(count, device=centres.device)
    squared = (lines - centres[..., None]).square()
    return lines.long(), squared.masked_fill(lines >= available[..., None], torch.inf)

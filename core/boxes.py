"""Box arithmetic: areas, IoU, GIoU, the delta coder. Everything is element-wise over leading dimensions.

Boxes are `xyxy` float pixels. A width is x2 - x1 + `geometry.plus_one`; GIoU never adds the one, in either geometry, as
in the authors' code (spec PAA section 2).
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from core.geometry import MODERN, Geometry

CENTRE_STD, SIZE_STD = 0.1, 0.2  # of dx, dy and of dw, dh: Faster R-CNN's coder weights 10, 10, 5, 5
MAX_LOG_SIZE = math.log(1000 / 16)  # largest predicted log size ratio, Fast R-CNN's clamp


def box_area(boxes: Float[Tensor, "*n 4"], geometry: Geometry = MODERN) -> Float[Tensor, " *n"]:
    """Area in square pixels; sides below 0 count as 0."""
    sides = _sides(boxes[..., :2], boxes[..., 2:], geometry)
    return sides[..., 0] * sides[..., 1]


def box_centres(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 2"]:
    """Middle of the corners, (x, y). The same in both geometries."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def box_iou(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*m 4"], geometry: Geometry = MODERN) -> Float[Tensor, "..."]:
    """IoU in [0, 1] of boxes paired by broadcasting; two boxes without area have IoU 0.

    For all pairs call it with `a[:, None]` and `b[None]`.
    """
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    sides = _sides(top_left, bottom_right, geometry)
    intersection = sides[..., 0] * sides[..., 1]
    union = box_area(a, geometry) + box_area(b, geometry).clamp(min=1e-6) - intersection
    return intersection / union


def _sides(low: Tensor, high: Tensor, geometry: Geometry) -> Tensor:
    """Width and height, at least 0. No pass over the data for a constant of 0: pairs are many."""
    sides = high - low
    return (sides + geometry.plus_one if geometry.plus_one else sides).clamp(min=0)


def encode_deltas(
    anchors: Float[Tensor, "*#n 4"], boxes: Float[Tensor, "*#n 4"], geometry: Geometry = MODERN
) -> Float[Tensor, "*n 4"]:
    """Deltas (dx, dy, dw, dh) that turn anchors into boxes (Fast R-CNN's coder, spec PAA section 2).

    Anchors and boxes need positive sides; a box without area gives -inf or NaN.
    """
    anchor_sizes = anchors[..., 2:] - anchors[..., :2] + geometry.plus_one
    sizes = boxes[..., 2:] - boxes[..., :2] + geometry.plus_one
    shift = (box_centres(boxes) - box_centres(anchors)) / anchor_sizes
    return torch.cat([shift / CENTRE_STD, (sizes / anchor_sizes).log() / SIZE_STD], dim=-1)


def decode_deltas(
    anchors: Float[Tensor, "*#n 4"],
    deltas: Float[Tensor, "*#n 4"],
    geometry: Geometry = MODERN,
    clamp_both_sides: bool = True,
) -> Float[Tensor, "*n 4"]:
    """Boxes from anchors and deltas, the inverse of `encode_deltas`, in float32 or better.

    Args:
        anchors: boxes with positive sides.
        deltas: (dx, dy, dw, dh); dw and dh are clamped to at most ln(1000/16) after scaling.
        geometry: convention of both boxes.
        clamp_both_sides: also clamp dw and dh from below (MMDetection); the authors clamp from above only.
    """
    deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
    anchor_sizes = anchors[..., 2:] - anchors[..., :2] + geometry.plus_one
    centres = box_centres(anchors) + deltas[..., :2] * CENTRE_STD * anchor_sizes
    log_sizes = (deltas[..., 2:] * SIZE_STD).clamp(min=-MAX_LOG_SIZE if clamp_both_sides else None, max=MAX_LOG_SIZE)
    half = (anchor_sizes * log_sizes.exp() - geometry.plus_one) / 2
    return torch.cat([centres - half, centres + half], dim=-1)


def boxes_from_distances(points: Float[Tensor, "*#n 2"], distances: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*n 4"]:
    """Boxes from points (x, y) and their distances (left, top, right, bottom) to the sides (FCOS, Eq. 1)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def distances_to_sides(points: Float[Tensor, "*#n 2"], boxes: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*n 4"]:
    """Distances (left, top, right, bottom) of points to the sides of boxes; below 0 where a point lies outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def clip_boxes(
    boxes: Float[Tensor, "B n 4"], sizes: Int[Tensor, "B 2"], geometry: Geometry = MODERN
) -> Float[Tensor, "B n 4"]:
    """Boxes cut to their image, [0, W - plus_one] x [0, H - plus_one]; `sizes` holds height and width."""
    limits = sizes.flip(-1).repeat(1, 2)[:, None].to(boxes.dtype) - geometry.plus_one
    return torch.minimum(boxes.clamp(min=0), limits)


def centres_inside(
    points: Float[Tensor, "*#n 2"], boxes: Float[Tensor, "*#n 4"], margin: float = 0.01
) -> Bool[Tensor, " *n"]:
    """Whether points lie more than `margin` pixels inside boxes (ATSS, Algorithm 1, line 12)."""
    gaps = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)
    return gaps.amin(dim=-1) > margin

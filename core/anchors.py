"""Anchor boxes and points of every pyramid level: one square of side 8 * stride per cell.

Anchors are numbered level by level from the finest, inside a level row by row.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from core.geometry import MODERN, Geometry

STRIDES = (8, 16, 32, 64, 128)  # of P3..P7
ANCHOR_SCALE = 8.0  # side of the square anchor in strides: 64 px on P3 .. 1024 px on P7
SIZE_DIVISOR = 32  # a canvas is a multiple of it; anchors beyond an image's size rounded up to it lie in padding


class AnchorGrid(NamedTuple):
    """The anchors of one canvas, all levels together."""

    boxes: Float[Tensor, "A 4"]
    points: Float[Tensor, "A 2"]  # anchor centres (x, y)
    shapes: tuple[tuple[int, int], ...]  # height, width of each level in cells
    strides: tuple[int, ...]  # of each level, pixels

    @property
    def level_sizes(self) -> list[int]:
        """Number of anchors of each level: what `Tensor.split` wants."""
        return [height * width for height, width in self.shapes]


def level_shapes(canvas: tuple[int, int], strides: tuple[int, ...] = STRIDES) -> tuple[tuple[int, int], ...]:
    """Height and width in cells of every level for a canvas in pixels: repeated halving rounds up.

    An 800 x 1344 canvas gives 22,400 anchors (spec PAA section 13, check 1).
    """
    height, width = canvas
    return tuple((-(-height // stride), -(-width // stride)) for stride in strides)


def level_anchors(
    shape: tuple[int, int],
    stride: int,
    geometry: Geometry = MODERN,
    scale: float = ANCHOR_SCALE,
    device: torch.device | None = None,
) -> tuple[Float[Tensor, "A 4"], Float[Tensor, "A 2"]]:
    """Boxes and centres of one level.

    The anchor of row i, column j is centred at ((j + o) * stride, (i + o) * stride) with o the geometry's centre offset
    and has sides scale * stride in that geometry's measure: [-32, -32, 32, 32] first on P3 in modern, [-27.5, -27.5,
    35.5, 35.5] in legacy (spec PAA section 2).
    """
    height, width = shape
    y = (torch.arange(height, device=device, dtype=torch.float32) + geometry.centre_offset) * stride
    x = (torch.arange(width, device=device, dtype=torch.float32) + geometry.centre_offset) * stride
    points = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)
    half = (scale * stride - geometry.plus_one) / 2
    return torch.cat([points - half, points + half], dim=-1), points


def anchor_grid(
    shapes: tuple[tuple[int, int], ...],
    geometry: Geometry = MODERN,
    strides: tuple[int, ...] = STRIDES,
    scale: float = ANCHOR_SCALE,
    device: torch.device | None = None,
) -> AnchorGrid:
    """Anchors of all levels; `shapes` are the feature maps' heights and widths, finest level first."""
    levels = [
        level_anchors(shape, stride, geometry, scale, device) for shape, stride in zip(shapes, strides, strict=True)
    ]
    boxes, points = (torch.cat(parts) for parts in zip(*levels, strict=True))
    return AnchorGrid(boxes, points, tuple(shapes), tuple(strides))


def anchor_strides(grid: AnchorGrid) -> Float[Tensor, " A"]:
    """Stride of every anchor's level, pixels. No copy from the host."""
    device = grid.boxes.device
    levels = [
        torch.full((size,), float(stride), device=device)
        for size, stride in zip(grid.level_sizes, grid.strides, strict=True)
    ]
    return torch.cat(levels)


def anchors_inside(grid: AnchorGrid, sizes: Int[Tensor, "B 2"]) -> Bool[Tensor, "B A"]:
    """Anchors whose cell lies in their image's own size rounded up to `SIZE_DIVISOR`, not in the batch's padding.

    A level of a 117 x 150 image covers ceil(128 / stride) rows and ceil(160 / stride) columns.
    """
    rounded = -(-sizes // SIZE_DIVISOR) * SIZE_DIVISOR
    masks = []
    for (height, width), stride in zip(grid.shapes, grid.strides, strict=True):
        cells = -(-rounded // stride)
        rows = torch.arange(height, device=sizes.device) < cells[:, :1]
        columns = torch.arange(width, device=sizes.device) < cells[:, 1:]
        masks.append((rows[:, :, None] & columns[:, None, :]).flatten(1))
    return torch.cat(masks, dim=1)

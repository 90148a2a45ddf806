"""Anchors of every level: SSD's sizes and shapes around cell centres (paper, section 3; spec section 2.1).

Anchors are numbered level by level from the finest, inside a level cell by cell, row by row, inside a cell by shape:
small square, large square, then for ratio 2 (and 3) the wide and the tall one.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from padet.config import AnchorRow, level_sides

LARGEST_PERCENT = 90  # of the input side: where the sizes of all levels but the first end (SSD, section 2.2)
# Sizes of the first and the second level in percent of the input side. 384 has those of SSD300, 512 those of SSD512
# (authors' code); 192 those of 384.
FIRST_PERCENTS: dict[tuple[AnchorRow, int], tuple[int, int]] = {
    ("coco", 192): (7, 15),
    ("coco", 384): (7, 15),
    ("coco", 512): (4, 10),
    ("voc", 192): (10, 20),
    ("voc", 384): (10, 20),
    ("voc", 512): (7, 15),
}
MANY_RATIOS, FEW_RATIOS = (2, 3), (2,)  # of wide and tall anchors: all levels but the last two, and those


class Anchors(NamedTuple):
    """The anchors of an input size, all levels together."""

    boxes: Float[Tensor, "A 4"]  # xyxy pixels; they may reach beyond the image
    sides: tuple[int, ...]  # cells of each level along either axis
    per_cell: tuple[int, ...]  # anchors of a cell of each level

    @property
    def level_sizes(self) -> list[int]:
        """Number of anchors of each level: what `Tensor.split` wants. 18,400 in all at 384, 32,756 at 512."""
        return [side * side * count for side, count in zip(self.sides, self.per_cell, strict=True)]


def level_percents(size: int, row: AnchorRow) -> list[int]:
    """Anchor size of every level in percent of the input side, and one more for the last level's larger square.

    SSD's Eq. 4 in whole percent, as the authors' code rounds it: first, min, min + step, ... with
    step = floor((90 - min) / (levels - 2)). At 384 with `coco`: 7, 15, 33, 51, 69, 87, 105.
    """
    levels = len(level_sides(size))
    first, second = FIRST_PERCENTS[row, size]
    step = (LARGEST_PERCENT - second) // (levels - 2)
    return [first, *(second + step * level for level in range(levels))]


def level_ratios(size: int) -> list[tuple[int, ...]]:
    """Ratios of every level: 2 and 3, but on the last two levels only 2."""
    levels = len(level_sides(size))
    return [MANY_RATIOS] * (levels - 2) + [FEW_RATIOS] * 2


def anchors_per_cell(size: int) -> tuple[int, ...]:
    """Anchors of a cell of every level: 6, on the last two levels 4."""
    return tuple(2 + 2 * len(ratios) for ratios in level_ratios(size))


def cell_shapes(small: float, next_small: float, ratios: tuple[int, ...]) -> Float[Tensor, "n 2"]:
    """Widths and heights of one cell's anchors (SSD, section 2.2), in the unit of the sizes.

    Args:
        small: s_k, side of the small square; anchors of the other ratios have its area.
        next_small: s_(k+1), the next level's; the large square's side is sqrt(s_k * s_(k+1)).
        ratios: of the long to the short side, each once wide and once tall.
    """
    large = (small * next_small) ** 0.5
    shapes = [(small, small), (large, large)]
    for ratio in ratios:
        long, short = small * ratio**0.5, small / ratio**0.5
        shapes += [(long, short), (short, long)]
    return torch.tensor(shapes, dtype=torch.float64)


def build_anchors(size: int, row: AnchorRow = "coco") -> Anchors:
    """Anchors of an input of size x size pixels.

    A cell's anchors are centred at (column + 0.5, row + 0.5) * size / cells. Widths and heights are at most the
    input's: at 384 with `coco` this cuts the two widest of the last level. Corners are not cut, which would move
    centres.

    Args:
        size: side of the square input, pixels; see `padet.config.level_sides` for which there are.
        row: whose sizes, those for COCO or those for PASCAL VOC.
    """
    percents, sides = level_percents(size, row), level_sides(size)
    boxes = []
    for level, (side, ratios) in enumerate(zip(sides, level_ratios(size), strict=True)):
        small, next_small = (percents[level + n] * size / 100 for n in range(2))
        half = cell_shapes(small, next_small, ratios).clamp(max=size) / 2
        centres = (torch.arange(side, dtype=torch.float64) + 0.5) * (size / side)
        points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1).view(-1, 1, 2)
        boxes.append(torch.cat([points - half, points + half], dim=-1).view(-1, 4))
    return Anchors(torch.cat(boxes).float(), sides, anchors_per_cell(size))

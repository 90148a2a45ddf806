"""Anchors: the spec's tables and golden checks 1 and 2."""

import pytest
import torch

from padet.anchors import anchors_per_cell, build_anchors, cell_shapes, level_percents, level_ratios
from padet.config import SIZES, AnchorRow, level_sides


def sides_of(boxes: torch.Tensor) -> torch.Tensor:
    return boxes[:, 2:] - boxes[:, :2]


@pytest.mark.parametrize(
    ("size", "sides", "counts", "total"),
    [
        (192, (24, 12, 6, 3, 1), [3456, 864, 216, 36, 4], 4576),
        (384, (48, 24, 12, 6, 3, 1), [13824, 3456, 864, 216, 36, 4], 18400),
        (512, (64, 32, 16, 8, 4, 2, 1), [24576, 6144, 1536, 384, 96, 16, 4], 32756),
    ],
)
def test_counts_of_every_level(size: int, sides: tuple[int, ...], counts: list[int], total: int) -> None:
    # Check 1
    anchors = build_anchors(size)
    assert level_sides(size) == anchors.sides == sides
    assert anchors.level_sizes == counts
    assert len(anchors.boxes) == total
    assert anchors_per_cell(size) == anchors.per_cell == (*[6] * (len(sides) - 2), 4, 4)
    assert level_ratios(size)[-3:] == [(2, 3), (2,), (2,)]


@pytest.mark.parametrize(
    ("row", "size", "percents"),
    [
        ("coco", 384, [7, 15, 33, 51, 69, 87, 105]),
        ("voc", 384, [10, 20, 37, 54, 71, 88, 105]),
        ("coco", 512, [4, 10, 26, 42, 58, 74, 90, 106]),
        ("voc", 512, [7, 15, 30, 45, 60, 75, 90, 105]),
        ("coco", 192, [7, 15, 40, 65, 90, 115]),  # step floor(75 / 3)
        ("voc", 192, [10, 20, 43, 66, 89, 112]),  # step floor(70 / 3)
    ],
)
def test_percentages(row: AnchorRow, size: int, percents: list[int]) -> None:
    # Spec section 2.1
    assert level_percents(size, row) == percents


def test_first_level_at_384_by_hand() -> None:
    # Check 2: small square, sqrt(26.88 * 57.6), then ratio 2 wide and tall, ratio 3 wide and tall
    anchors = build_anchors(384)
    first = anchors.boxes[:6]
    expected = [
        [26.88, 26.88],
        [39.348, 39.348],
        [38.014, 19.007],
        [19.007, 38.014],
        [46.558, 15.519],
        [15.519, 46.558],
    ]
    torch.testing.assert_close(sides_of(first), torch.tensor(expected), atol=1e-3, rtol=0)
    centres = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
    torch.testing.assert_close(centres[:6], torch.full((6, 2), 4.0))  # 4 / 384 = 0.0104167
    torch.testing.assert_close(centres[6], torch.tensor([12.0, 4.0]))
    torch.testing.assert_close(centres[6 * 48], torch.tensor([4.0, 12.0]))  # row by row
    torch.testing.assert_close(centres[-1], torch.tensor([192.0, 192.0]))


def test_large_squares_of_every_level_by_hand() -> None:
    # Check 2: s' of the six levels at 384
    anchors = build_anchors(384)
    squares = [level[1] for level in anchors.boxes.split(anchors.level_sizes)]
    expected = torch.tensor([39.348, 85.435, 157.534, 227.793, 297.519, 367.016])
    torch.testing.assert_close(sides_of(torch.stack(squares))[:, 0], expected, atol=1e-3, rtol=0)


def test_only_sides_are_cut_to_the_image() -> None:
    # Spec section 2.1: two of 18,400 anchors at 384, 334.08 * sqrt(2) = 472.46 px before; corners may lie outside
    assert cell_shapes(334.08, 403.2, (2,)).max().item() == pytest.approx(472.46, abs=0.01)
    anchors = build_anchors(384)
    assert (sides_of(anchors.boxes) == 384).any(dim=1).sum().item() == 2
    assert anchors.boxes.min().item() < 0
    assert anchors.boxes.max().item() > 384


@pytest.mark.parametrize("row", ["coco", "voc"])
@pytest.mark.parametrize("size", SIZES)
def test_anchors_against_a_loop(size: int, row: AnchorRow) -> None:
    percents, boxes = level_percents(size, row), []
    for level, side in enumerate(level_sides(size)):
        small, following = percents[level] * size / 100, percents[level + 1] * size / 100
        shapes = [(small, small), ((small * following) ** 0.5,) * 2]
        for ratio in level_ratios(size)[level]:
            shapes += [(small * ratio**0.5, small / ratio**0.5), (small / ratio**0.5, small * ratio**0.5)]
        for y in range(side):
            for x in range(side):
                for width, height in shapes:
                    w, h = min(width, size) / 2, min(height, size) / 2
                    cx, cy = (x + 0.5) * size / side, (y + 0.5) * size / side
                    boxes.append([cx - w, cy - h, cx + w, cy + h])
    torch.testing.assert_close(build_anchors(size, row).boxes, torch.tensor(boxes), atol=1e-4, rtol=0)

import pytest
import torch

from core.anchors import AnchorGrid, anchor_grid, anchors_inside, level_shapes
from core.geometry import LEGACY, MODERN, Geometry


def test_800_by_1344_has_22400_anchors() -> None:
    shapes = level_shapes((800, 1344))
    assert [h * w for h, w in shapes] == [16800, 4200, 1050, 273, 77]
    assert anchor_grid(shapes).level_sizes == [16800, 4200, 1050, 273, 77]
    assert len(anchor_grid(shapes).boxes) == 22400


def test_level_shapes_round_up() -> None:
    assert level_shapes((1, 129)) == ((1, 17), (1, 9), (1, 5), (1, 3), (1, 2))


def test_first_anchor_of_each_level_legacy() -> None:
    # centre s/2, half side (8 s - 1) / 2: 4 -+ 31.5, 8 -+ 63.5, 16 -+ 127.5, 32 -+ 255.5, 64 -+ 511.5
    expected = [(-27.5, 35.5), (-55.5, 71.5), (-111.5, 143.5), (-223.5, 287.5), (-447.5, 575.5)]
    grid = anchor_grid(level_shapes((128, 160)), LEGACY)
    firsts = torch.stack([level[0] for level in grid.boxes.split(grid.level_sizes)])
    assert firsts.tolist() == [[low, low, high, high] for low, high in expected]
    assert grid.points[0].tolist() == [4, 4]


def test_first_anchor_of_each_level_modern() -> None:
    grid = anchor_grid(level_shapes((128, 160)), MODERN)
    firsts = torch.stack([level[0] for level in grid.boxes.split(grid.level_sizes)])
    assert firsts.tolist() == [[-4.0 * s, -4.0 * s, 4.0 * s, 4.0 * s] for s in (8, 16, 32, 64, 128)]
    assert grid.points[0].tolist() == [0, 0]


@pytest.mark.parametrize("geometry", [MODERN, LEGACY])
def test_numbering_goes_by_level_row_column(geometry: Geometry) -> None:
    grid = anchor_grid(((2, 3), (1, 2)), geometry, strides=(8, 16), scale=4.0)
    index = 0
    for (height, width), stride in zip(grid.shapes, grid.strides, strict=True):
        for row in range(height):
            for column in range(width):
                x, y = ((line + geometry.centre_offset) * stride for line in (column, row))
                x1, y1, x2, y2 = grid.boxes[index].tolist()
                assert grid.points[index].tolist() == [x, y]
                assert ((x1 + x2) / 2, (y1 + y2) / 2) == (x, y)
                assert x2 - x1 + geometry.plus_one == y2 - y1 + geometry.plus_one == 4 * stride
                index += 1
    assert index == len(grid.boxes) == len(grid.points)


def test_anchors_inside_by_hand() -> None:
    # 117 x 150 rounds up to 128 x 160: all of a 128 x 160 canvas. 40 x 96 rounds up to 64 x 96.
    grid = anchor_grid(level_shapes((128, 160)))
    inside = anchors_inside(grid, torch.tensor([[117, 150], [40, 96]]))
    assert inside[0].all()
    assert inside[1].sum() == 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1 * 1


def test_anchors_inside_against_a_loop() -> None:
    grid = anchor_grid(level_shapes((160, 256)))
    sizes = torch.tensor([[160, 256], [1, 1], [33, 200], [100, 32]])
    inside = anchors_inside(grid, sizes)
    for (height, width), mask in zip(sizes.tolist(), inside, strict=True):
        height, width = (-(-side // 32) * 32 for side in (height, width))
        expected = [
            row * stride < height and column * stride < width  # the cell's corner lies in the image
            for (rows, columns), stride in zip(grid.shapes, grid.strides, strict=True)
            for row in range(rows)
            for column in range(columns)
        ]
        assert mask.tolist() == expected


def test_levels_without_cells() -> None:
    grid = anchor_grid(((0, 4), (2, 0)), strides=(8, 16))
    assert isinstance(grid, AnchorGrid)
    assert grid.boxes.shape == (0, 4)
    assert anchors_inside(grid, torch.tensor([[32, 32]])).shape == (1, 0)

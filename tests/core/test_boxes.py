import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from core.boxes import box_area, box_centres, box_iou, centres_inside, clip_boxes, decode_deltas, encode_deltas
from core.geometry import LEGACY, MODERN, Geometry
from tests.core.operators import Recorder

BOTH = pytest.mark.parametrize("geometry", [MODERN, LEGACY])


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 100 - 20
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 60], dim=-1)


def test_area_by_hand() -> None:
    square, inverted, point = boxes((0, 0, 10, 20), (5, 5, 0, 10), (3, 3, 3, 3))
    assert box_area(torch.stack([square, inverted, point])).tolist() == [200, 0, 0]
    assert box_area(torch.stack([square, inverted, point]), LEGACY).tolist() == [11 * 21, 0, 1]


def test_iou_by_hand() -> None:
    a, b = boxes((0, 0, 10, 10)), boxes((5, 5, 15, 15))
    # modern: 25 / (100 + 100 - 25); legacy: 6 * 6 / (121 + 121 - 36)
    torch.testing.assert_close(box_iou(a, b), torch.tensor([25 / 175]))
    torch.testing.assert_close(box_iou(a, b, LEGACY), torch.tensor([36 / 206]))


def test_iou_of_anchor_by_hand() -> None:
    # spec PAA section 13, check 2: 32 * 32 / (64 * 64), all inside
    assert box_iou(boxes((-27.5, -27.5, 35.5, 35.5)), boxes((0, 0, 31, 31)), LEGACY).item() == 0.25
    assert box_iou(boxes((-32, -32, 32, 32)), boxes((0, 0, 32, 32))).item() == 0.25


def test_iou_edge_cases() -> None:
    touching = box_iou(boxes((0, 0, 10, 10)), boxes((10, 0, 20, 10)))
    points = box_iou(boxes((3, 3, 3, 3)), boxes((3, 3, 3, 3)))
    inverted = box_iou(boxes((9, 9, 0, 0)), boxes((0, 0, 9, 9)))
    assert torch.cat([touching, points, inverted]).tolist() == [0, 0, 0]
    assert box_iou(boxes((0, 0, 9, 9)), boxes((0, 0, 9, 9))).item() == 1
    assert box_iou(boxes()[:, None], random_boxes(3, 0)[None]).shape == (0, 3)


@BOTH
def test_iou_matrix_against_a_loop(geometry: Geometry) -> None:
    a, b = random_boxes(12, 0), random_boxes(9, 1)
    matrix = box_iou(a[:, None], b[None], geometry)
    for i, p in enumerate(a.tolist()):
        for j, q in enumerate(b.tolist()):
            width = max(0.0, min(p[2], q[2]) - max(p[0], q[0]) + geometry.plus_one)
            height = max(0.0, min(p[3], q[3]) - max(p[1], q[1]) + geometry.plus_one)
            areas = [(r[2] - r[0] + geometry.plus_one) * (r[3] - r[1] + geometry.plus_one) for r in (p, q)]
            assert matrix[i, j].item() == pytest.approx(width * height / (sum(areas) - width * height), abs=1e-5)


@BOTH
def test_iou_stays_in_range(geometry: Geometry) -> None:
    a = random_boxes(2000, 3)
    nearly = a + torch.randn(a.shape, generator=torch.Generator().manual_seed(4)) * 1e-5
    assert box_iou(a, nearly, geometry).max() <= 1
    assert (box_iou(a, a, geometry) == 1).all()


def test_encode_by_hand() -> None:
    # spec PAA section 13, check 2. legacy: centres 4 and 15.5, 10 * 11.5 / 64; 5 ln(32 / 64)
    deltas = encode_deltas(boxes((-27.5, -27.5, 35.5, 35.5)), boxes((0, 0, 31, 31)), LEGACY)
    torch.testing.assert_close(deltas, boxes((1.796875, 1.796875, -3.465736, -3.465736)))
    deltas = encode_deltas(boxes((-32, -32, 32, 32)), boxes((0, 0, 32, 32)))  # 10 * 16 / 64
    torch.testing.assert_close(deltas, boxes((2.5, 2.5, -3.465736, -3.465736)))


@BOTH
def test_decode_inverts_encode(geometry: Geometry) -> None:
    anchors, targets = (
        random_boxes(50, 0) + torch.tensor([0, 0, 5, 5]),
        random_boxes(50, 1) + torch.tensor([0, 0, 5, 5]),
    )
    decoded = decode_deltas(anchors, encode_deltas(anchors, targets, geometry), geometry)
    torch.testing.assert_close(decoded, targets, atol=1e-4, rtol=0)
    torch.testing.assert_close(decode_deltas(anchors, torch.zeros(50, 4), geometry), anchors)


@BOTH
@pytest.mark.parametrize("both_sides", [True, False])
def test_decode_clamps_sizes(geometry: Geometry, both_sides: bool) -> None:
    # spec PAA section 13, check 3: 64 * 62.5 = 4000; 64 * e^-20 or, clamped, 64 / 62.5 = 1.024
    half = (64 - geometry.plus_one) / 2
    anchors = boxes((-half, -half, half, half))
    large, small = (
        decode_deltas(anchors, torch.tensor([[0, 0, d, 0.0]]), geometry, both_sides) for d in (100.0, -100.0)
    )
    assert (large[0, 2] - large[0, 0] + geometry.plus_one).item() == pytest.approx(4000, rel=1e-5)
    expected = 1.024 if both_sides else 64 * math.exp(-20)
    assert (small[0, 2] - small[0, 0] + geometry.plus_one).item() == pytest.approx(expected, abs=1e-6)


def test_decode_in_float32_and_without_waiting() -> None:
    anchors, deltas = random_boxes(5, 0).expand(2, 5, 4), torch.full((2, 5, 4), 0.7, dtype=torch.bfloat16)
    with Recorder() as recorder:
        decoded = decode_deltas(anchors, deltas)
        encode_deltas(anchors, decoded)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, decode_deltas(anchors, deltas.float()), rtol=0, atol=0)
    assert recorder.waiting == []


def test_decode_gradient_is_finite_at_extremes() -> None:
    deltas = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    decoded = decode_deltas(boxes((0, 0, 1024, 1024)), deltas)
    decoded.sum().backward()
    assert decoded.isfinite().all()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()


def test_clip_by_hand() -> None:
    outside = boxes((-5, -5, 500, 500), (10, 20, 30, 40), (200, 200, 300, 300))[None].repeat(2, 1, 1)
    sizes = torch.tensor([[117, 150], [60, 35]])  # height, width
    clipped = clip_boxes(outside, sizes)
    assert clipped[0].tolist() == [[0, 0, 150, 117], [10, 20, 30, 40], [150, 117, 150, 117]]
    assert clipped[1].tolist() == [[0, 0, 35, 60], [10, 20, 30, 40], [35, 60, 35, 60]]
    assert clip_boxes(outside, sizes, LEGACY)[0, 0].tolist() == [0, 0, 149, 116]


def test_centres() -> None:
    assert box_centres(boxes((0, 10, 31, 20))).tolist() == [[15.5, 15]]


def test_centres_inside_needs_more_than_the_margin() -> None:
    box = boxes((0, 0, 10, 10))
    points = torch.tensor([[5.0, 5], [0, 5], [0.0099, 5], [0.0101, 5], [5, 9.98], [5, 10], [-3, 5], [5, 12]])
    assert centres_inside(points, box).tolist() == [True, False, False, True, True, False, False, False]
    margins = [centres_inside(torch.tensor([[2.0, 5.0]]), box, margin).item() for margin in (0.0, 1.99, 2.0, 3.0)]
    assert margins == [True, True, False, False]
    assert all(a >= b for a, b in pairwise(margins))

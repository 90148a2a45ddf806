"""Sizes and boxes on the way into a batch, against numbers worked out by hand."""

import numpy as np
import pytest
from PIL import Image

from core.data.transforms import (
    clip_boxes,
    corner_boxes,
    flip_boxes,
    network_sizes,
    resize,
    resized_sizes,
    scale_boxes,
    usable_boxes,
)
from core.geometry import LEGACY, MODERN


def width_height(width: int, height: int, truncate: bool) -> tuple[int, int]:
    out = resized_sizes(np.array([[height, width]]), 800, 1333, truncate)[0]
    return int(out[1]), int(out[0])


@pytest.mark.parametrize(
    ("size", "official", "rounded"),
    [
        ((640, 480), (1066, 800), (1067, 800)),  # 800 * 4 / 3 = 1066.67
        ((500, 375), (1066, 800), (1067, 800)),
        ((640, 427), (1199, 800), (1199, 800)),  # 1199.06
        ((427, 640), (800, 1199), (800, 1199)),
        ((640, 250), (1333, 521), (1333, 521)),  # 1333 * 250 / 640 = 520.7; 521 * 2.56 = 1333.76
        ((800, 800), (800, 800), (800, 800)),
        ((4000, 1), (4000, 1), (1333, 1)),  # int(1333 / 4000) = 0, raised to 1 pixel, which the other side follows
    ],
)
def test_resized_sizes(size: tuple[int, int], official: tuple[int, int], rounded: tuple[int, int]) -> None:
    """Spec PAA section 13, check 6 (official); MMDetection rounds to nearest."""
    assert width_height(*size, truncate=True) == official
    assert width_height(*size, truncate=False) == rounded


def authors_rule(width: int, height: int, size: int, limit: int) -> tuple[int, int]:
    """Spec section 8 for one image, in plain numbers."""
    small, large = min(width, height), max(width, height)
    if large / small * size > limit:
        size = round(limit * small / large)
    return (size, int(size * height / width)) if width < height else (int(size * width / height), size)


def test_resized_sizes_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 900, (200, 2))
    many = resized_sizes(sizes, 640, 1000, truncate=True)
    assert many[:, ::-1].tolist() == [list(authors_rule(int(w), int(h), 640, 1000)) for h, w in sizes]
    many = resized_sizes(sizes, 640, 1000)
    for (height, width), out in zip(sizes.tolist(), many.tolist(), strict=True):
        factor = min(1000 / max(height, width), 640 / min(height, width))
        assert out == [int(height * factor + 0.5), int(width * factor + 0.5)]


def test_resize_is_pillows_bilinear() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for size in ((40, 50), (7, 9), (20, 30)):
        expected = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(resize(image, size), expected)
    # two columns, black and white, to one: the filter averages when it shrinks
    assert resize(np.array([[[0, 0, 0], [200, 200, 200]]], np.uint8), (1, 1)).tolist() == [[[100, 100, 100]]]


def test_corner_boxes_and_flip_by_hand() -> None:
    """Spec PAA section 13, check 5: (10, 20, 30, 40) is [10, 20, 39, 59]; flipped at W = 100 [60, 20, 89, 59]."""
    xywh = np.array([[10.0, 20, 30, 40]])
    legacy, modern = corner_boxes(xywh, LEGACY), corner_boxes(xywh, MODERN)
    assert legacy.tolist() == [[10, 20, 39, 59]]
    assert modern.tolist() == [[10, 20, 40, 60]]
    assert flip_boxes(legacy, 100, LEGACY).tolist() == [[60, 20, 89, 59]]
    assert flip_boxes(modern, 100, MODERN).tolist() == [[60, 20, 90, 60]]
    assert corner_boxes(np.array([[3.0, 4, 0.5, 2]]), LEGACY).tolist() == [[3, 4, 3, 5]]  # max(w - 1, 0)


@pytest.mark.parametrize("geometry", [LEGACY, MODERN])
def test_flipped_box_covers_the_flipped_pixels(geometry) -> None:  # type: ignore[no-untyped-def]
    image = np.zeros((6, 9), bool)
    image[1:4, 2:8] = True  # columns 2..7
    flipped = np.flatnonzero(image[:, ::-1].any(axis=0))
    box = flip_boxes(corner_boxes(np.array([[2.0, 1, 6, 3]]), geometry), 9, geometry)[0]
    assert (box[0], box[2] - 1 + geometry.plus_one) == (flipped[0], flipped[-1])


def test_clip_and_usable_boxes() -> None:
    boxes = np.array([[-5.0, -1, 200, 300], [90, 10, 110, 20], [100, 10, 120, 20], [1, 2, 3, 4], [5, 6, 5, 9]])
    modern, legacy = clip_boxes(boxes, (50, 100), MODERN), clip_boxes(boxes, (50, 100), LEGACY)
    assert modern[:3].tolist() == [[0, 0, 100, 50], [90, 10, 100, 20], [100, 10, 100, 20]]
    assert legacy[:3].tolist() == [[0, 0, 99, 49], [90, 10, 99, 20], [99, 10, 99, 20]]
    crowd = np.array([False, False, False, True, False])
    assert usable_boxes(modern, crowd).tolist() == [True, True, False, False, False]


def test_scale_boxes_each_axis_by_its_own_ratio() -> None:
    boxes = np.array([[10.0, 20, 30, 40]])
    assert scale_boxes(boxes, (100, 200), (50, 300)).tolist() == [[15, 10, 45, 20]]


def test_no_boxes() -> None:
    none = np.zeros((0, 4))
    assert flip_boxes(
        scale_boxes(clip_boxes(corner_boxes(none, MODERN), (5, 5), MODERN), (5, 5), (9, 9)), 9, MODERN
    ).shape == (0, 4)
    assert usable_boxes(none, np.zeros(0, bool)).shape == (0,)


def test_network_sizes_by_rule() -> None:
    sizes = np.array([[480, 640], [427, 640]])  # long sides of 1066.67 and 1199.06 at 800
    assert network_sizes(sizes, (800, 1333), "round").tolist() == [[800, 1067], [800, 1199]]
    assert network_sizes(sizes, (800, 1333), "truncate").tolist() == [[800, 1066], [800, 1199]]
    assert network_sizes(sizes, (384, 384), "square").tolist() == [[384, 384], [384, 384]]
    assert network_sizes(sizes[:0], (384, 384), "square").shape == (0, 2)

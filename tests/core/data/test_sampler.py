"""Which images form which batch."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.config import PyramidConfig
from core.data.sampler import (
    _distinct,
    augmentation_random,
    permutation,
    random_bits,
    training_images,
    training_sampler,
)
from core.data.table import Category, NoImages, Table
from core.data.transforms import resized_sizes
from core.errors import UserError
from core.profiles import ProfileName
from tests.core.square import SquareConfig

CONFIG = PyramidConfig(data="test", steps=1, batch_size=4, short_side=96, long_side=160)


def make_table(sizes: list[tuple[int, int]], boxes: list[list[float]] | None = None, **changes: Any) -> Table:
    """A table of images of these (height, width), each with one box, or the box given (none: no box)."""
    count = len(sizes)
    xywh = np.array([[1.0, 1, 9, 9]] * count if boxes is None else [box for box in boxes if box]).reshape(-1, 4)
    counts = [1] * count if boxes is None else [int(bool(box)) for box in boxes]
    columns: dict[str, Any] = {
        "image_ids": np.arange(count),
        "heights": np.array([height for height, _ in sizes], np.int32),
        "widths": np.array([width for _, width in sizes], np.int32),
        "name_offsets": np.zeros(count + 1, np.int64),
        "name_bytes": np.zeros(0, np.uint8),
        "box_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "boxes_xywh": xywh,
        "labels": np.zeros(len(xywh), np.int32),
        "crowd": np.zeros(len(xywh), bool),
        "areas": np.ones(len(xywh)),
        "annotation_ids": np.arange(len(xywh)),
        "difficult": np.zeros(len(xywh), bool),
    }
    return Table(categories=(Category(1, "a"),), images=NoImages(), source="test", **(columns | changes))


def taken(table: Table, config: PyramidConfig, steps: int) -> list[int]:
    sampler = training_sampler(table, config)
    return [int(row) for step in range(1, steps + 1) for row in sampler.batch(step).images]


def test_every_image_once_per_epoch() -> None:
    table = make_table([(30, 40)] * 12 + [(40, 30)] * 8)
    for epoch in range(3):
        rows = taken(table, CONFIG, 15)[20 * epoch : 20 * epoch + 20]
        assert sorted(rows) == list(range(20))
    orders = [tuple(taken(table, replace(CONFIG, seed=seed), 5)) for seed in range(3)]
    assert len(set(orders)) == 3


@pytest.mark.parametrize(("wide", "high"), [(13, 6), (1, 1), (7, 0), (0, 3), (2, 30), (5, 1)])
def test_every_image_equally_often_over_many_epochs(wide: int, high: int) -> None:
    table = make_table([(30, 40)] * wide + [(40, 30)] * high)
    epochs = 12
    steps = epochs * (wide + high) // CONFIG.batch_size
    counts = Counter(taken(table, CONFIG, steps))
    for row in range(wide + high):
        # each orientation may lag behind by less than one batch, and have begun one more pass
        slack = 1 + CONFIG.batch_size / (wide if row < wide else high)
        assert abs(counts[row] - epochs) <= slack, counts


def test_a_batch_has_one_orientation_and_one_scale() -> None:
    table = make_table([(30, 40)] * 9 + [(40, 30)] * 9 + [(30, 30)] * 3)
    sampler = training_sampler(table, replace(CONFIG, short_side_min=64))
    portrait = table.heights > table.widths
    seen = set()
    for step in range(1, 60):
        plan = sampler.batch(step)
        assert len(plan.images) == 4
        assert len(set(portrait[plan.images])) == 1
        assert 64 <= plan.short_side <= 96
        seen.add(plan.short_side)
    assert len(seen) > 15


def test_canvases_are_few_and_hold_every_image() -> None:
    rng = np.random.default_rng(0)
    table = make_table([(int(h), int(w)) for h, w in rng.integers(20, 90, (60, 2))])
    profiles: tuple[ProfileName, ...] = ("ours", "official")
    for profile in profiles:
        config = replace(CONFIG, short_side_min=50, short_side=101, long_side=160, profile=profile)
        sampler = training_sampler(table, config)
        canvases: dict[tuple[bool, int], set[tuple[int, int]]] = {}
        for step in range(1, 200):
            plan = sampler.batch(step)
            sizes = np.stack([table.heights, table.widths], axis=1)[plan.images]
            resized = resized_sizes(sizes, plan.short_side, 160, config.switches.truncate_resized)
            assert (resized <= plan.canvas).all()
            assert plan.canvas[0] % 32 == plan.canvas[1] % 32 == 0
            bucket = bool(sizes[0, 0] > sizes[0, 1]), -(-plan.short_side // 32)
            canvases.setdefault(bucket, set()).add(plan.canvas)
        assert len(canvases) == 6  # two orientations; short sides to 64, 96, 128
        assert all(len(found) == 1 for found in canvases.values())


def test_short_sides_of_one_bucket_share_a_canvas() -> None:
    config = replace(CONFIG, short_side_min=65, short_side=101, long_side=400)
    sampler = training_sampler(make_table([(40, 60)] * 4), config)
    canvases = {(plan.short_side, plan.canvas) for plan in map(sampler.batch, range(1, 300))}
    # 96 * 3 / 2 = 144 and 101 * 3 / 2 = 151.5, both within 160
    assert {canvas for short, canvas in canvases if short <= 96} == {(96, 160)}
    assert {canvas for short, canvas in canvases if short > 96} == {(128, 160)}


def test_canvas_is_no_wider_than_the_data() -> None:
    landscape = training_sampler(make_table([(480, 640)] * 4), replace(CONFIG, short_side=800, long_side=1333))
    assert landscape.batch(1).canvas == (800, 1088)  # 1067 rounded up, not 1333 (spec PAA section 13, check 6)


def test_squares_have_one_group_and_one_canvas() -> None:
    table = make_table([(30, 40)] * 9 + [(40, 30)] * 9 + [(30, 300)] * 2)
    config = SquareConfig(steps=1, batch_size=4, size=70)
    sampler = training_sampler(table, config)
    plans = [sampler.batch(step) for step in range(1, 11)]  # two epochs of five batches
    assert {(plan.short_side, plan.long_side, plan.canvas) for plan in plans} == {(70, 70, (96, 96))}
    for epoch in (plans[:5], plans[5:]):
        assert sorted(row for plan in epoch for row in plan.images) == list(range(20))
    portrait = table.heights > table.widths
    assert any(len(set(portrait[plan.images])) == 2 for plan in plans)


def test_flips_are_fair_and_fixed() -> None:
    table = make_table([(30, 40)] * 8)
    sampler = training_sampler(table, CONFIG)
    flips = np.concatenate([sampler.batch(step).flips for step in range(1, 251)])
    assert 430 < flips.sum() < 570  # 1000 fair coins, 4.4 standard deviations
    assert (training_sampler(table, CONFIG).batch(77).flips == sampler.batch(77).flips).all()


def test_empty_images() -> None:
    boxes: list[list[float]] = [[1, 1, 9, 9], [], [1, 1, 9, 1], [1, 1, 9, 1.5], [1, 1, 9, 9]]
    table = make_table([(30, 40)] * 5, boxes, crowd=np.array([False, False, False, True]))
    assert training_images(table, "skip").tolist() == [0, 3]  # no box, a box of one pixel's height, only crowd
    assert training_images(table, "keep").tolist() == [0, 1, 2, 3, 4]
    normalised = make_table([(30, 40)] * 2, [[0.1, 0.1, 0.5, 0.5]] * 2)
    with pytest.raises(UserError, match="boxes are x, y, width, height in pixels"):
        training_sampler(normalised, CONFIG)


def philox(key: list[int], counter: list[int]) -> list[int]:
    """Philox4x64-10 of one counter (Salmon et al. 2011, section 4), in plain integers."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b % 2**64, (a >> 64) ^ c3 ^ k1, a % 2**64
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
    return [c0, c1, c2, c3]


def test_random_numbers_never_change() -> None:
    """A run must mean the same with the next numpy: the bits are Philox's own, counted from 1."""
    expected = philox([7, 2], [1, 0, 5, 0]) + philox([7, 2], [2, 0, 5, 0])
    assert random_bits(7, 2, 5, count=8).tolist() == expected
    assert permutation(7, 2, 5, 8).tolist() == sorted(range(8), key=lambda i: expected[i])
    assert sorted(permutation(1, 0, 9, 100)) == list(range(100))
    for place in range(3):  # an image has a stream of its own, of any length
        random = augmentation_random(7, 9, place).bit_generator
        expected = philox([7, 5], [1, 0, 9, place]) + philox([7, 5], [2, 0, 9, place])
        assert [int(random.random_raw()) for _ in range(8)] == expected
    assert random_bits(-1, 2, 5, count=4).tolist() == philox([2**64 - 1, 2], [1, 0, 5, 0])


def test_distinct_sizes() -> None:
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 6, (2, 100), dtype=np.int32) * 2**20
    expected = sorted(set(zip(heights.tolist(), widths.tolist(), strict=True)))
    assert _distinct(heights, widths).tolist() == [list(pair) for pair in expected]

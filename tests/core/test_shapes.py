"""Drawn images: boxes hold exactly the visible pixels, and an image depends on nothing but its numbers."""

from pathlib import Path

import numpy as np
import pytest

from core import shapes
from core.data.table import COLUMNS
from core.shapes import KINDS, Shape, clip_window, draw_image, plan_scene, shape_coverage, shapes_table


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHORAGE_CACHE", str(tmp_path))


def visible_by_hand(scene: shapes.Scene) -> list[np.ndarray]:
    """Visible masks, pixel by pixel from front to back."""
    covers = []
    for shape in scene.shapes:
        coverage, top, left = shape_coverage(shape)
        rows, columns, part = clip_window(coverage.shape, top, left, (scene.height, scene.width))
        mask = np.zeros((scene.height, scene.width), bool)
        mask[rows, columns] = coverage[part] >= 0.5
        covers.append(mask)
    hidden = np.zeros((scene.height, scene.width), bool)
    visible = []
    for mask in reversed(covers):
        visible.append(mask & ~hidden)
        hidden |= mask
    return visible[::-1]


def test_boxes_hold_exactly_the_visible_pixels() -> None:
    for index in range(30):
        scene = plan_scene(1, "train", index)
        assert 1 <= len(scene.shapes) <= shapes.MAX_SHAPES
        for mask, (x, y, w, h) in zip(visible_by_hand(scene), scene.boxes_xywh.astype(int).tolist(), strict=True):
            inside = np.zeros_like(mask)
            inside[y : y + h, x : x + w] = True
            assert not (mask & ~inside).any()
            assert mask[y].any()
            assert mask[y + h - 1].any()
            assert mask[:, x].any()
            assert mask[:, x + w - 1].any()


def test_a_shape_changes_no_pixel_outside_its_box(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn with and without its front shape, an image differs inside that box only, but for a soft edge."""
    checked = 0
    real = shapes.plan_scene
    for index in range(20):
        scene = real(2, "val", index)
        whole = draw_image(2, "val", index).astype(int)
        less = scene._replace(shapes=scene.shapes[:-1])
        # the last shape is painted last, so all random numbers before it are the same; the noise after it is not
        monkeypatch.setattr(shapes, "plan_scene", lambda *_, less=less: less)
        without = draw_image(2, "val", index).astype(int)
        monkeypatch.setattr(shapes, "plan_scene", real)
        x, y, w, h = scene.boxes_xywh[-1].astype(int)
        changed = np.abs(whole - without).max(axis=2) > 60  # above any noise
        outside = changed.copy()
        outside[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1] = False
        assert not outside.any()
        checked += changed.any()
    assert checked > 15


def test_little_is_hidden() -> None:
    for index in range(30):
        scene = plan_scene(4, "train", index)
        for shape, mask in zip(scene.shapes, visible_by_hand(scene), strict=True):
            whole = (shape_coverage(shape)[0] >= 0.5).sum()
            assert mask.sum() >= shapes.MIN_VISIBLE * whole


def test_a_shape_that_is_mostly_out_of_sight_is_not_placed() -> None:
    empty = np.full((50, 50), -1, np.int8)
    square = Shape(KINDS.index("square"), x=25, y=25, radius=20, angle=0, hue=0)
    areas: list[int] = []
    owner = shapes._place(square, empty, areas)
    assert owner is not None
    assert areas == [(owner == 0).sum()]
    assert shapes._place(square._replace(x=2), empty, []) is None  # 57 % inside the image
    assert shapes._place(square._replace(x=5), empty, []) is not None  # 68 %
    # sides of 28.3 px: moved by 18 px, a second square leaves 64 % of the first in sight; by 16 px, 57 %
    assert shapes._place(square._replace(x=43), owner, areas.copy()) is not None
    assert shapes._place(square._replace(x=41), owner, areas.copy()) is None


def test_the_kinds_by_their_area() -> None:
    """Area over that of the circumscribed square: pi/4, 1/2 (square), 3*sqrt(3)/16 (triangle), 0.33 (star)."""
    expected = {"circle": 0.7854, "square": 0.5, "triangle": 0.3248, "star": 5 * 0.45 * np.sin(np.pi / 5) / 4}
    for kind, name in enumerate(KINDS):
        shape = Shape(kind, x=100.3, y=99.8, radius=60.0, angle=0.2, hue=0.0)
        area = shape_coverage(shape)[0].sum() / 120**2
        assert area == pytest.approx(expected[name], abs=0.012), name


def test_an_image_depends_on_its_numbers_only() -> None:
    first = draw_image(3, "train", 7)
    draw_image(3, "train", 8)
    np.testing.assert_array_equal(draw_image(3, "train", 7), first)
    others = [draw_image(4, "train", 7), draw_image(3, "val", 7), draw_image(3, "train", 6)]
    assert all(other.shape != first.shape or (other != first).any() for other in others)


def test_table(tmp_path: Path) -> None:
    table = shapes_table("val", 25, seed=9)
    again = shapes_table("val", 25, seed=9)
    assert table.digest == again.digest
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(table, name), getattr(again, name))
    assert shapes_table("val", 25, seed=10).digest != table.digest
    more = shapes_table("val", 30, seed=9)  # the first images stay what they were
    np.testing.assert_array_equal(more.boxes_xywh[: len(table.labels)], table.boxes_xywh)
    for index in range(25):
        image = table.read_image(index)
        assert image.shape == (table.heights[index], table.widths[index], 3)
        np.testing.assert_array_equal(plan_scene(9, "val", index).boxes_xywh, table.boxes_xywh[table.box_slice(index)])
    assert (table.heights > table.widths).any()
    assert (table.heights < table.widths).any()
    assert set(table.labels.tolist()) == set(range(len(KINDS)))
    sides = table.boxes_xywh[:, 2:].max(axis=1)
    assert ((sides >= 20) & (sides <= 120)).mean() > 0.6

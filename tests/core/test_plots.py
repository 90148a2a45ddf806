"""Pictures of decisions: what part of an image is shown, and that every kind of object can be drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.decisions import Decision
from core.plots import COLOURS, Row, _height, _limits, crop_window, draw_decisions

GREY = np.full((90, 120, 3), 128, np.uint8)


def decision(count: int, positives: int, curves: bool = True) -> Decision:
    """Anchors around an object of 20 px; the last one is ignored where there are more than two."""
    rng = np.random.default_rng(0)
    outcomes = np.where(np.arange(count) < positives, 0, 2)
    outcomes[2:][-1:] = 1
    box = np.array([40.0, 30, 60, 50])
    boxes = box + rng.normal(0, 2, (count, 4))
    return Decision(
        box,
        0,
        np.linspace(0.2, 2.0, count),
        outcomes,
        3 + np.arange(count) % 5,
        rng.uniform(40, 60, (count, 2)),
        boxes,
        rng.uniform(0, 1, count),
        curves=(lambda x: {"first": np.exp(-x), "second": x, "both": np.exp(-x) + x}) if curves else None,
        note="a note",
    )


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        # at least 0.35 of the short side: 140 x 189 around (50, 40), moved inside
        ((40, 30, 60, 50), (400, 600), (0, 0, 189, 140)),
        # 20 px high: twice that is shown, 40 x 54 around (50, 40)
        ((40, 30, 60, 50), (90, 120), (23, 20, 77, 60)),
        # the image's upper left corner: moved inside
        ((0, 0, 20, 20), (90, 120), (0, 0, 54, 40)),
        # a flat box: 54 / 1.35 = 40, twice that is 80 x 108
        ((30, 40, 84, 50), (90, 120), (3, 5, 111, 85)),
        # larger than the image: all of it
        ((0, 0, 120, 90), (90, 120), (0, 0, 120, 90)),
    ],
)
def test_crop_by_hand(box: tuple[int, ...], size: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    assert crop_window(np.array(box, dtype=float), size) == expected


def test_crop_holds_the_object() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(1, 300, 2))
        x, y = np.sort(rng.uniform(0, width, 2)), np.sort(rng.uniform(0, height, 2))
        left, top, right, bottom = crop_window(np.array([x[0], y[0], x[1], y[1]]), (height, width))
        assert 0 <= left <= x[0] + 1
        assert 0 <= top <= y[0] + 1
        assert x[1] - 1 <= right <= width
        assert y[1] - 1 <= bottom <= height


def test_axis_is_never_a_point() -> None:
    assert _limits(np.array([])) == (0.0, 1.0)
    assert _limits(np.array([0.5, 0.5])) == pytest.approx((0.48, 0.52))
    assert _limits(np.array([1.0, 3.0])) == pytest.approx((0.9, 3.1))


def test_a_narrow_curve_does_not_flatten_the_others() -> None:
    flat, spike = np.full(5, 2.0), np.array([0.0, 0, 400, 0, 0])
    assert _height([flat, spike], flat + spike) == pytest.approx(1.4 * 12)  # six times the flat one
    assert _height([flat, flat], 2 * flat) == pytest.approx(1.4 * 4)


def test_picture_has_a_row_for_each_object(tmp_path: Path) -> None:
    rows = [Row(GREY, f"{n}", decision(n, min(n, 2), curves=n > 1)) for n in (0, 1, 5)]
    draw_decisions(tmp_path / "three.png", rows, "title", "subtitle", "score")
    draw_decisions(tmp_path / "none.png", [], "title", "subtitle", "score")
    assert {path.name for path in tmp_path.iterdir()} == {"three.png", "none.png"}
    three, none = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("three.png", "none.png"))
    assert three.shape[0] > 5 * none.shape[0]
    assert three.shape[1] == none.shape[1]
    for outcome, colour in COLOURS.items():
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (three == rgb).all(axis=2).sum() > 20, outcome
        assert (none == rgb).all(axis=2).sum() == 0, outcome

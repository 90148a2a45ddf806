"""Pictures of decisions: what part of an image is shown, and that every kind of object can be drawn."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from core.decisions import Decision, LevelMap, level_maps
from core.plots import (
    COLOURS,
    Row,
    _height,
    _limits,
    _number_ranks,
    _summary,
    crop_window,
    draw_decisions,
    draw_maps,
    shown_maximum,
)

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
    assert _limits(np.array([0.0, 0.0])) == (-0.02, 0.02)
    assert _limits(np.array([0.5, 0.5])) == pytest.approx((0.495, 0.505))
    assert _limits(np.array([1e-4, 3e-4])) == pytest.approx((0.9e-4, 3.1e-4))
    assert _limits(np.array([1.0, 3.0])) == pytest.approx((0.9, 3.1))


def test_ranges_of_small_and_large_numbers() -> None:
    one = decision(3, 2)
    small = one._replace(scores=np.array([0.000123, 0.0, 7.0]), ious=np.array([0.512, 0.512, 0.9]))
    assert _summary(small, "positive", "t") == "2 positive: t 0 to 0.00012, IoU 0.51"
    assert _summary(small, "ignored", "anchor score") == "1 ignored: anchor score 7.00, IoU 0.90"
    assert _summary(small, "negative", "t") == "0 negative"


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


def test_shown_maximum_by_hand() -> None:
    """Centres at x 0, 8, 16 and y 0, 8 (in the file's pixels): the window 8..16 x 0..4 shows two of the first row."""
    values = np.array([[9.0, 2, 3], [7, 8, 5]])
    level = LevelMap(3, np.zeros(2), np.array([8.0, 8]), {"t": values, "none": 0 * values})
    assert shown_maximum(level, "t", (8, 0, 16, 4)) == 3
    assert shown_maximum(level, "t", (0, 0, 20, 20)) == 9
    assert shown_maximum(level, "t", (1, 0, 7, 20)) == 0  # between two columns
    assert shown_maximum(level._replace(step=np.array([4.0, 8])), "t", (1, 0, 7, 20)) == 8
    assert shown_maximum(level, "none", (0, 0, 20, 20)) == 0


def cells(picture: np.ndarray, panel: int, panels: int) -> np.ndarray:
    """Pixels of one of a line's panels whose colour is that of a map's highest number."""
    width = picture.shape[1] * 0.94 / panels  # the colour bar stands at the right
    part = picture[:, round(panel * width) : round((panel + 1) * width)].astype(int)
    return np.asarray((abs(part - [20, 41, 98]) < 14).all(axis=2))


def test_maps_show_each_cell_around_its_centre(tmp_path: Path) -> None:
    """The object of 20 px around (50, 40): one cell of P4, centred at (48, 32), is high."""
    one = decision(3, 2)
    numbers = np.zeros((12 * 15) + 6 * 8)
    numbers[12 * 15 + 2 * 8 + 3] = 0.7
    maps = level_maps({"t": numbers}, ((12, 15), (6, 8)), (8, 16))
    draw_maps(tmp_path / "maps.png", [Row(GREY, "title", one._replace(maps=maps))], "title", "subtitle")
    picture = np.asarray(Image.open(tmp_path / "maps.png").convert("RGB"))
    assert cells(picture, 0, 2).sum() == 0
    high = np.argwhere(cells(picture, 1, 2))
    assert len(high) > 1000
    # shown are 54 x 40 px, cut at y 20: the cell is x 40 to 56 and y 24 to 40, its sides are equal
    height, width = np.ptp(high, axis=0)
    assert height == pytest.approx(width, rel=0.05)


def test_maps_of_nothing_and_of_several_objects(tmp_path: Path) -> None:
    maps = level_maps({"score": np.zeros(4), "t": np.zeros(4)}, ((2, 2),), (64,))
    rows = [Row(GREY, f"{n}", decision(n, min(n, 2))._replace(maps=maps)) for n in (0, 3)]
    draw_maps(tmp_path / "two.png", rows, "title", "subtitle")
    draw_maps(tmp_path / "one.png", rows[:1], "title", "subtitle")
    two, one = (np.asarray(Image.open(tmp_path / name)) for name in ("two.png", "one.png"))
    assert two.shape[1] == one.shape[1]
    assert two.shape[0] > 1.5 * one.shape[0]


@pytest.mark.parametrize("falling", [False, True])
def test_ranks_stand_where_they_have_room(falling: bool) -> None:
    """Anchors 0 and 1 share a level and almost their score, anchor 2 is alone; the axis is 1 wide."""
    scores = np.array([0.5, 0.505, 0.9])
    one = decision(3, 3)._replace(scores=-scores if falling else scores, levels=np.array([3, 3, 3]))
    axes = Figure().add_subplot()
    _number_ranks(axes, one._replace(outcomes=np.zeros(3, dtype=np.int64)), 1.0)
    assert [text.get_text() for text in axes.texts] == ["1", "3"]

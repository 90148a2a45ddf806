"""SSD's augmentation: every step by hand, slow twins, what must hold for any draw."""

import colorsys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.data.loader import Sample, train_batches
from core.shapes import shapes_table
from padet import augment as augmentation_module
from padet.augment import (
    FILTERS,
    Distortion,
    Window,
    accepted,
    augment,
    augmentation,
    centres_inside,
    crop_boxes,
    distort,
    draw_crop,
    draw_distortion,
    draw_expansion,
    draw_windows,
    fill_colour,
    look,
    shift_colours,
)
from padet.config import Config

FILL = (124, 116, 104)
NO_DISTORTION = [0.9] * 5  # four changes that are not made, and the order
NO_EXPANSION, NO_CROP, LINEAR, NO_MIRROR = [0.9], [0.0], [0.0], [0.9]


class Script(np.random.Generator):
    """Random numbers that are given."""

    def __init__(self, numbers: Sequence[float]) -> None:
        super().__init__(np.random.PCG64(0))
        self.numbers = list(numbers)

    def random(self, size: Any = None, *_: Any) -> Any:  # type: ignore[override]
        count = 1 if size is None else int(np.prod(size))
        taken, self.numbers = self.numbers[:count], self.numbers[count:]
        assert len(taken) == count
        return taken[0] if size is None else np.array(taken).reshape(size)


def boxes_of(*rows: Sequence[float]) -> np.ndarray:
    return np.array(rows, np.float64).reshape(-1, 4)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample_of(image: np.ndarray, *rows: Sequence[float]) -> Sample:
    return Sample(image, boxes_of(*rows), np.arange(len(rows), dtype=np.int32))


def pixel(*colour: int) -> np.ndarray:
    return np.array([[colour]], np.uint8)


# Colours


@pytest.mark.parametrize(
    ("distortion", "before", "after"),
    [
        (Distortion(brightness=20.0), (10, 100, 250), (30, 120, 255)),
        (Distortion(brightness=-20.0), (10, 100, 250), (0, 80, 230)),
        (Distortion(contrast=1.5), (0, 100, 200), (0, 150, 255)),
        (Distortion(contrast=0.5), (0, 100, 200), (0, 50, 100)),
        (Distortion(brightness=60.0, contrast=0.5), (250, 20, 0), (128, 40, 30)),  # clamped in between: 310 to 255
        # maximum 200 stays; distances 50 and 100 to it grow to 75 and 150
        (Distortion(saturation=1.5), (200, 150, 100), (200, 125, 50)),
        (Distortion(saturation=1.5), (200, 50, 50), (200, 0, 0)),  # S = 3/4, times 1.5 is more than 1
        (Distortion(saturation=0.5, hue=36.0), (80, 80, 80), (80, 80, 80)),  # grey has neither
        (Distortion(hue=36.0), (255, 0, 0), (255, 153, 0)),  # 36 of the 60 degrees from red to yellow: 0.6 * 255
        (Distortion(hue=-36.0), (255, 0, 0), (255, 0, 153)),  # below 0 degrees, towards magenta
        (Distortion(hue=36.0), (0, 0, 200), (120, 0, 200)),
        (Distortion(hue=24.0), (255, 0, 51), (255, 51, 0)),  # 348 degrees become 12, a fifth of the way to yellow
    ],
)
def test_colours_by_hand(distortion: Distortion, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    assert distort(pixel(*before), distortion).reshape(3).tolist() == list(after)


def test_contrast_before_or_after_saturation() -> None:
    red = pixel(200, 100, 100)
    # before: (300 -> 255, 150, 150), then 255 - 105 * 0.4 = 213; after: 200 - 100 * 0.4 = 160, then (255, 240, 240)
    both = {"contrast": 1.5, "saturation": 0.4}
    assert distort(red, Distortion(**both, contrast_first=True)).reshape(3).tolist() == [255, 213, 213]
    assert distort(red, Distortion(**both, contrast_first=False)).reshape(3).tolist() == [255, 240, 240]


@pytest.mark.parametrize(("saturation", "hue"), [(1.0, 36.0), (1.0, -36.0), (0.5, 0.0), (1.5, 0.0), (1.3, -17.0)])
def test_shifted_colours_against_colorsys(saturation: float, hue: float) -> None:
    image = picture(70, 9, seed=1)  # more rows than are shifted at once
    image[::7] = image[::7, :, :1]  # grey
    image[1::7, :, 1] = image[1::7, :, 2]  # two channels alike
    image[0, 0], image[0, 1] = 0, 255
    expected = np.empty(image.shape)
    for index in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(image[index] / 255))
        expected[index] = np.array(colorsys.hsv_to_rgb((h + hue / 360) % 1, min(s * saturation, 1), v)) * 255
    assert np.abs(shift_colours(image, saturation, hue) - expected).max() <= 0.501


def test_colours_that_do_not_change() -> None:
    image = picture(40, 50)
    for first in (True, False):
        assert (distort(image, Distortion(contrast_first=first)) == image).all()
    assert (shift_colours(image, 1.0, 0.0) == image).all()
    assert distort(image[:0], Distortion(brightness=5.0)).shape == (0, 50, 3)


def test_drawn_distortions() -> None:
    random = np.random.default_rng(0)
    drawn = np.array([draw_distortion(random) for _ in range(2000)])
    made = drawn != [0, 1, 1, 0, 0]
    assert (abs(made.mean(axis=0) - 0.5) < 0.05).all()  # 4.5 standard deviations of 2000 fair coins
    assert abs(np.corrcoef(made.T) - np.eye(5)).max() < 0.1  # independent of each other
    for column, (low, high) in enumerate([(-32, 32), (0.5, 1.5), (0.5, 1.5), (-36, 36)]):
        values = drawn[made[:, column], column]
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high >= values.max() > high - 0.02 * (high - low)
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


# Expansion


def test_expansion_by_hand() -> None:
    # golden check 12: ratio 1 + 3 / 3 = 2; 101 and 51 places, of which the numbers name 30 and 10
    draws = [0.1, 1 / 3, 30.5 / 101, 10.5 / 51]
    assert draw_expansion(Script(draws), 100, 50) == Window(30, 10, 200, 100)
    sample = sample_of(picture(50, 100), [10, 5, 20, 15])
    found = augment(sample, (100, 200), Script([*NO_DISTORTION, *draws, *NO_CROP, *LINEAR, *NO_MIRROR]), FILL)
    assert found.boxes.tolist() == [[40, 15, 50, 25]]
    assert (found.image[10:60, 30:130] == sample.image).all()
    border = np.ones((100, 200), bool)
    border[10:60, 30:130] = False
    assert (found.image[border] == FILL).all()


def test_drawn_expansions() -> None:
    random = np.random.default_rng(0)
    drawn = [draw_expansion(random, 100, 50) for _ in range(2000)]
    larger = [place for place in drawn if place != Window(0, 0, 100, 50)]
    assert abs(len(larger) / 2000 - 0.5) < 0.05
    widths = np.array([place.width for place in larger])
    assert 100 <= widths.min() <= 103
    assert 397 <= widths.max() <= 400
    assert widths.mean() == pytest.approx(250, abs=15)  # ratio 2.5
    for left, top, width, height in larger:
        assert abs(width - 2 * height) <= 2
        assert 0 <= left <= width - 100
        assert 0 <= top <= height - 50
    assert np.mean([place.left / max(place.width - 100, 1) for place in larger]) == pytest.approx(0.5, abs=0.05)


def test_no_augmentation() -> None:
    assert augmentation(Config(augment="none")) is None
    assert augmentation(Config()) is not None


@pytest.mark.parametrize(
    ("config", "colour"),
    [(Config(), (124, 116, 104)), (Config(pixels="caffe"), (123, 117, 104))],  # both RGB
)
def test_fill_colour(config: Config, colour: tuple[int, int, int]) -> None:
    assert fill_colour(config) == colour


# Crop


def slow_iou(crop: Sequence[int], box: Sequence[float]) -> float:
    left, top, width, height = crop
    x1, y1, x2, y2 = box
    across = min(left + width, x2) - max(left, x1)
    down = min(top + height, y2) - max(top, y1)
    shared = across * down if across > 0 and down > 0 else 0.0
    return shared / (width * height + (x2 - x1) * (y2 - y1) - shared)


def slow_inside(crop: Sequence[int], box: Sequence[float]) -> bool:
    left, top, width, height = crop
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return left < x < left + width and top < y < top + height


def test_windows_by_hand() -> None:
    # scale 0.65, whose square 0.4225 leaves aspects 0.5 to 2, so 1.25: 0.65 * 1.118 and 0.65 / 1.118 of 200 x 100 are
    # 145 and 58 px; 56 columns and 43 rows are possible places, half and a quarter of which are 28 and 10.
    # Scale 0.9: aspects 0.81 to 1 / 0.81; the lowest gives 0.9 * 0.9 and 0.9 / 0.9 of the sides, the highest the
    # reverse. Scale 0.3, aspect 0.5: 0.3 * 0.7071 of 200 and 0.3 / 0.7071 of 100.
    first = [[0.5, 0.5, 0.5, 0.25], [6 / 7, 0.0, 0.0, 0.999], [6 / 7, 1.0, 0.999, 0.0]]
    numbers = np.array(first + [[0.0] * 4] * 47)
    windows = draw_windows(Script(numbers.T.ravel().tolist()), 200, 100)
    assert windows[:4].tolist() == [[28, 10, 145, 58], [0, 0, 162, 100], [0, 0, 200, 81], [0, 0, 42, 42]]


def test_drawn_windows() -> None:
    random = np.random.default_rng(0)
    windows = np.concatenate([draw_windows(random, 640, 480) for _ in range(40)])
    left, top, width, height = windows.T
    assert (windows[:, :2] >= 0).all()
    assert (left + width <= 640).all()
    assert (top + height <= 480).all()
    aspect, scale = width / 640 * 480 / height, np.sqrt(width * height / 640 / 480)
    assert aspect.min() > 0.49
    assert aspect.max() < 2.02
    assert 0.295 < scale.min() < 0.31
    assert scale.max() > 0.99
    assert scale.mean() == pytest.approx(0.65, abs=0.02)
    free = width < 640
    assert (left[free] / (640 - width[free])).mean() == pytest.approx(0.5, abs=0.03)
    assert draw_windows(random, 1, 1).tolist() == [[0, 0, 1, 1]] * 50


def test_accepted_against_a_loop() -> None:
    rng, good = np.random.default_rng(0), Counter[float]()
    for count in (1, 2, 9):
        crops = np.concatenate([rng.integers(0, 50, (60, 2)), rng.integers(1, 50, (60, 2))], axis=1)
        corners = rng.integers(0, 60, (count, 2)).astype(float)
        boxes = np.concatenate([corners, corners + rng.integers(1, 40, (count, 2))], axis=1)
        for least in (0.0, 0.1, 0.5):
            expected = [
                any(slow_iou(crop, box) >= least for box in boxes) and any(slow_inside(crop, box) for box in boxes)
                for crop in crops.tolist()
            ]
            assert accepted(crops, boxes, least).tolist() == expected
            good[least] += sum(expected)
    assert 180 > good[0.0] > good[0.1] > good[0.5] > 0


def test_accepted_by_hand() -> None:
    crops = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [5, 0, 10, 10]])
    boxes = boxes_of([0, 0, 10, 10])
    assert accepted(crops, boxes, 0.5).tolist() == [True, False, False]  # IoU 1; centre on the edge; and again
    # the object that overlaps enough need not be the one whose centre is inside
    two = boxes_of([0, 0, 10, 10], [6, 4, 8, 6])
    assert accepted(crops, two, 0.5).tolist() == [True, False, False]
    assert accepted(crops, two, 0.3).tolist() == [True, False, True]  # IoU 1/3 with the first, centre (7, 5) inside


def test_minima_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[float | None] = Counter()

    def note(crops: np.ndarray, boxes: np.ndarray, least: float) -> np.ndarray:
        seen[least] += 1
        return np.ones(len(crops), bool)

    monkeypatch.setattr(augmentation_module, "accepted", note)
    random, canvas = np.random.default_rng(0), Window(0, 0, 9000, 9000)
    crops = [draw_crop(random, boxes_of([1, 1, 80, 80]), canvas) for _ in range(1400)]
    seen[None] = 1400 - sum(seen.values())
    assert 0 <= sum(crop == canvas for crop in crops) - seen[None] <= 2  # a crop may be as large
    assert set(seen) == {None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0}
    assert all(abs(count - 200) < 55 for count in seen.values())  # 4.2 standard deviations


def test_crops_reach_their_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def note(crops: np.ndarray, boxes: np.ndarray, least: float) -> np.ndarray:
        asked.append(least)
        return accepted(crops, boxes, least)

    monkeypatch.setattr(augmentation_module, "accepted", note)
    canvas, random = Window(0, 0, 200, 150), np.random.default_rng(0)
    boxes = boxes_of([20, 30, 120, 140], [150, 10, 190, 60], [5, 5, 15, 12])
    reached: Counter[float] = Counter()
    for _ in range(400):
        crop = draw_crop(random, boxes, canvas)
        if crop == canvas:
            continue
        least = asked[-1]
        assert max(slow_iou(crop, box) for box in boxes.tolist()) >= least
        assert any(slow_inside(crop, box) for box in boxes.tolist())
        reached[least] += 1
    assert min(reached[least] for least in (0.0, 0.1, 0.3, 0.5, 0.7)) > 20


def test_an_object_too_small_for_any_minimum() -> None:
    canvas, box = Window(0, 0, 100, 100), boxes_of([40, 40, 42, 42])
    crops = [draw_crop(np.random.default_rng(seed), box, canvas) for seed in range(60)]
    assert 10 < sum(crop == canvas for crop in crops) < 50  # the whole image or any crop around the object
    assert all(slow_inside(crop, box[0].tolist()) for crop in crops)


def test_crops_without_objects() -> None:
    canvas = Window(0, 0, 100, 100)
    crops = [draw_crop(np.random.default_rng(seed), boxes_of(), canvas) for seed in range(210)]
    assert 10 < sum(crop == canvas for crop in crops) < 55  # one of seven


def test_boxes_of_a_crop_by_hand() -> None:
    crop = Window(20, 0, 50, 40)
    boxes = boxes_of([10, 10, 30, 30], [15, 10, 35, 30], [60, 30, 90, 36], [60, 30, 79, 48])
    assert centres_inside(boxes, crop).tolist() == [False, True, False, True]  # x 20 is on the edge, x 75 outside
    assert crop_boxes(boxes[[1, 3]], crop).tolist() == [[0, 10, 15, 30], [40, 30, 50, 40]]


def test_boxes_follow_the_crop() -> None:
    # the first crop of test_windows_by_hand, [28, 10, 145, 58]; centre (25, 30) is outside, (35, 30) inside
    sample = sample_of(picture(100, 200), [0, 20, 50, 40], [10, 20, 60, 40])
    windows = np.array([[0.5, 0.5, 0.5, 0.25]] * 50).T.ravel().tolist()
    script = [*NO_DISTORTION, *NO_EXPANSION, 0.99, *windows, *LINEAR, *NO_MIRROR]  # the last minimum: any crop
    found = augment(sample, (58, 145), Script(script), FILL)
    assert found.boxes.tolist() == [[0, 10, 32, 30]]
    assert found.labels.tolist() == [1]
    assert (found.image == sample.image[10:68, 28:173]).all()


# Resizing, mirroring and the whole


@pytest.mark.parametrize("number", range(5))
def test_resizing_warps_by_one_of_five_filters(number: int) -> None:
    sample = sample_of(picture(40, 50), [10, 10, 20, 30])
    script = [*NO_DISTORTION, *NO_EXPANSION, *NO_CROP, number / 5 + 0.1, *NO_MIRROR]
    found = augment(sample, (100, 100), Script(script), FILL)
    names = ["BILINEAR", "BOX", "NEAREST", "BICUBIC", "LANCZOS"]  # linear, area, nearest, cubic, Lanczos
    expected = Image.fromarray(sample.image).resize((100, 100), Image.Resampling[names[number]])
    assert (found.image == np.asarray(expected)).all()
    assert found.boxes.tolist() == [[20, 25, 40, 75]]  # x doubled, y times 2.5
    assert len(FILTERS) == 5


def test_thin_boxes_are_dropped_after_resizing() -> None:
    sample = sample_of(picture(100, 100), [10, 10, 12, 50], [10, 10, 11.9, 50], [10, 10, 50, 11])
    script = [*NO_DISTORTION, *NO_EXPANSION, *NO_CROP, *LINEAR, *NO_MIRROR]
    found = augment(sample, (50, 50), Script(script), FILL)
    assert found.boxes.tolist() == [[5, 5, 6, 25]]  # exactly one pixel wide
    assert found.labels.tolist() == [0]


def test_mirror_is_a_twin() -> None:
    sample = sample_of(picture(60, 80), [10, 10, 30, 50], [50, 5, 79, 20])
    script = [*NO_DISTORTION, *NO_EXPANSION, *NO_CROP, *LINEAR]
    plain, mirrored = (augment(sample, (64, 64), Script([*script, last]), FILL) for last in (0.5, 0.4999))
    assert (mirrored.image == plain.image[:, ::-1]).all()
    assert (
        mirrored.boxes[:, [2, 1, 0, 3]].tolist() == (np.array([64, 0, 64, 0]) + plain.boxes * [-1, 1, -1, 1]).tolist()
    )


def test_a_window_shows_what_the_whole_canvas_would() -> None:
    image, distortion = picture(30, 40), Distortion(10.0, 1.2, 0.8, 20.0, True)
    canvas = np.empty((90, 120, 3), np.uint8)
    canvas[:] = FILL
    canvas[20:50, 50:90] = distort(image, distortion)
    for left, top, width, height in [
        (0, 0, 120, 90),
        (60, 30, 20, 10),
        (40, 10, 30, 70),
        (0, 0, 20, 20),
        (70, 45, 50, 45),
    ]:
        window = Window(left - 50, top - 20, width, height)
        seen = np.asarray(look(image, window, distortion, FILL))
        assert (seen == canvas[top : top + height, left : left + width]).all()


def test_results_are_valid_for_any_draw() -> None:
    image = picture(60, 90)
    before = image.copy()
    rng, counts = np.random.default_rng(0), Counter[int]()
    for seed in range(300):
        corners = rng.uniform(0, 50, (seed % 4, 2))
        sample = sample_of(image, *np.concatenate([corners, corners + rng.uniform(0.2, 9, corners.shape)], axis=1))
        found = augment(sample, (96, 96), np.random.default_rng(seed), FILL)
        assert (found.image.shape, found.image.dtype) == ((96, 96, 3), np.uint8)
        assert len(found.boxes) == len(found.labels) <= len(sample.boxes)
        assert ((found.boxes >= 0) & (found.boxes <= 96)).all()
        assert (found.boxes[:, 2:] - found.boxes[:, :2] >= 1).all()
        assert set(found.labels.tolist()) <= set(sample.labels.tolist())
        counts[len(found.labels) - len(sample.labels)] += 1
    assert (image == before).all()
    assert counts[0] > 100
    assert counts[-1] > 10


def test_boxes_lie_on_their_pixels() -> None:
    image = np.zeros((60, 90, 3), np.uint8)
    image[20:45, 30:70] = 255
    sample = sample_of(image, [30, 20, 70, 45])
    for seed in range(150):
        found = augment(sample, (192, 192), np.random.default_rng(seed), (0, 0, 0))
        (box,) = found.boxes
        mask = found.image.max(axis=2) > found.image.max() / 2
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        # an edge may be off by a pixel, or by one of the smallest crop, 19 x 13 px, that Lanczos rings around
        assert np.abs(seen - box).max() <= 8, (seed, seen, box)


def test_the_same_with_any_workers_ranks_and_start() -> None:
    config = Config(size=192, backbone="resnet18", data="shapes", epochs=None, steps=3, batch_size=4, device="cpu")
    config = replace(config, workers=0)
    table = shapes_table("train", 6, seed=3)
    keywords: dict[str, Any] = {"steps": 3, "augment": augmentation(config)}
    alone = list(train_batches(table, config, start=0, **keywords))
    workers = list(train_batches(table, replace(config, workers=2), start=0, **keywords))
    later = list(train_batches(table, config, start=2, **keywords))
    ranks = [list(train_batches(table, config, start=0, rank=rank, world_size=2, **keywords)) for rank in (0, 1)]
    for one, two in zip(alone, workers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(alone[2], later[0], strict=True))
    for one, *parts in zip(alone, *ranks, strict=True):
        assert all(torch.equal(x, torch.cat(rows)) for x, *rows in zip(one, *parts, strict=True))
    assert alone[0].images.shape == (4, 3, 192, 192)
    assert not torch.equal(alone[0].images[0], alone[0].images[1])

"""Boxes drawn into an image."""

import numpy as np
import pytest

from core.draw import PALETTE, draw_detections

GREY = np.full((80, 120, 3), 128, np.uint8)
NAMES = ("cat", "dog")


def draw(boxes: list[list[float]], scores: list[float], labels: list[int]) -> np.ndarray:
    return np.asarray(
        draw_detections(GREY, np.array(boxes, np.float32).reshape(-1, 4), np.array(scores), np.array(labels), NAMES)
    )


def test_outline_has_the_class_colour_and_the_image_is_a_copy() -> None:
    picture = draw([[20, 40, 90, 70]], [0.9], [1])
    assert tuple(picture[70, 60]) == PALETTE[1]  # lower edge
    assert tuple(picture[55, 90]) == PALETTE[1]  # right edge
    assert tuple(picture[55, 60]) == (128, 128, 128)  # inside
    assert (GREY == 128).all()


def test_best_box_is_on_top() -> None:
    boxes = [[20, 40, 90, 70], [20, 40, 90, 70]]
    assert tuple(draw(boxes, [0.9, 0.8], [0, 1])[70, 60]) == PALETTE[0]
    assert tuple(draw(boxes, [0.8, 0.9], [0, 1])[70, 60]) == PALETTE[1]


@pytest.mark.parametrize("box", [[0, 0, 30, 20], [100, 60, 119, 79], [-20, -20, 300, 300], [50, 30, 40, 20]])
def test_name_stays_inside_the_picture(box: list[float]) -> None:
    picture = draw([box], [0.5], [0])
    tag = (picture == PALETTE[0]).all(axis=2)
    rows, columns = np.nonzero(tag)
    assert tag.sum() > 200  # the whole plate of the name, not only an outline
    assert rows.max() - rows.min() >= 8
    assert columns.max() - columns.min() >= 20


def test_no_detections_leave_the_image_as_it_is() -> None:
    assert (draw([], [], []) == GREY).all()

"""Where the outcome changes along the scores."""

import numpy as np
import pytest

from core.decisions import OUTCOMES, Decision, anchor_levels, borders, level_maps

P, I, N = (OUTCOMES.index(name) for name in ("positive", "ignored", "negative"))  # noqa: E741


def decision(scores: list[float], outcomes: list[int]) -> Decision:
    n = len(scores)
    places = np.zeros((n, 2)), np.zeros((n, 4)), np.zeros(n)
    codes = np.array(outcomes, dtype=np.int64)
    return Decision(np.array([0.0, 0, 8, 8]), 0, np.array(scores, dtype=float), codes, np.full(n, 3), *places)


@pytest.mark.parametrize(
    ("scores", "outcomes", "expected"),
    [
        ([0.1, 0.3, 0.7, 1.0], [P, P, N, N], [0.5]),
        ([0.7, 0.1, 1.0, 0.3], [N, P, N, P], [0.5]),  # any order
        ([0.1, 0.2, 0.4, 0.5, 0.9], [P, P, I, I, N], [0.3, 0.7]),  # scheme b
        ([0.1, 0.2, 0.4], [N, P, N], [0.15, 0.3]),  # the lowest score may be negative in scheme a
        ([0.5, 0.5, 0.5], [P, N, N], [0.5]),  # ties
        ([0.1, 0.2], [P, P], []),
        ([0.1], [N], []),
        ([], [], []),
    ],
)
def test_borders_by_hand(scores: list[float], outcomes: list[int], expected: list[float]) -> None:
    assert borders(decision(scores, outcomes)) == pytest.approx(expected)


def test_places_of_an_outcome() -> None:
    one = decision([0.1, 0.2, 0.3], [N, P, N])
    assert one.where("negative").tolist() == [0, 2]
    assert one.where("positive").tolist() == [1]
    assert one.where("ignored").tolist() == []


def test_levels_of_anchors_by_hand() -> None:
    assert anchor_levels(np.array([0, 5, 6, 7, 8, 0]), [6, 2, 1]).tolist() == [3, 3, 4, 4, 5, 3]
    assert anchor_levels(np.array([], dtype=np.int64), [6]).tolist() == []


def test_maps_of_levels_by_hand() -> None:
    """Two levels of 2 x 3 and 1 x 2 cells; with centres in the middle of the cells P4's first is at (8, 8)."""
    numbers = np.arange(8.0)
    fine, coarse = level_maps({"a": numbers, "b": -numbers}, ((2, 3), (1, 2)), (8, 16), centre_offset=0.5)
    assert (fine.level, coarse.level) == (3, 4)
    assert fine.values["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert coarse.values["b"].tolist() == [[-6, -7]]
    assert (fine.first.tolist(), fine.step.tolist()) == ([4, 4], [8, 8])
    assert (coarse.first.tolist(), coarse.step.tolist()) == ([8, 8], [16, 16])
    assert level_maps({"a": numbers}, ((2, 4),), (8,))[0].first.tolist() == [0, 0]

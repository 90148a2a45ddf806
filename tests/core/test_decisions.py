"""Where the outcome changes along the scores."""

import numpy as np
import pytest

from core.decisions import OUTCOMES, Decision, borders

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

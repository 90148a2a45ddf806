"""What an assigner decides about one object's anchors, in a form that pictures and records share (imports no torch)."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

Outcome = Literal["positive", "ignored", "negative"]
OUTCOMES: tuple[Outcome, ...] = ("positive", "ignored", "negative")  # a code in `Decision.outcomes` is a place here
FIRST_LEVEL = 3  # P3, the finest

Curves = Callable[[Float64[np.ndarray, " m"]], Mapping[str, Float64[np.ndarray, " m"]]]


class Decision(NamedTuple):
    """What became of the n anchors that an assigner weighed for one object, in the order of their rank."""

    box: Float64[np.ndarray, " 4"]  # of the object, xyxy pixels
    label: int  # 0..C-1
    scores: Float64[np.ndarray, " n"]  # what decides, the x axis of the plot
    outcomes: Int64[np.ndarray, " n"]  # place in OUTCOMES
    levels: Int64[np.ndarray, " n"]  # pyramid level, 3..7
    centres: Float64[np.ndarray, "n 2"]  # of the anchors, (x, y) pixels
    boxes: Float64[np.ndarray, "n 4"]  # predicted by the anchors
    ious: Float64[np.ndarray, " n"]  # of predicted box and object
    columns: Mapping[str, np.ndarray] = {}  # further numbers of each anchor, for the record
    facts: Mapping[str, Any] = {}  # further numbers of the object, plain values
    curves: Curves | None = None  # densities over the x axis by their names, the last one their sum
    note: str = ""  # one line about the object

    def where(self, outcome: Outcome) -> Int64[np.ndarray, " m"]:
        """Places of the anchors with one outcome."""
        return np.flatnonzero(self.outcomes == OUTCOMES.index(outcome))


def borders(decision: Decision) -> list[float]:
    """Scores at which the outcome changes, half-way between the two neighbours (Fig. 3 of PAA's paper draws these).

    Anchors are taken by rising score. Between equal scores of unequal outcome the border is that score.
    """
    order = np.argsort(decision.scores, kind="stable")
    scores, outcomes = decision.scores[order], decision.outcomes[order]
    return [float(scores[i] + scores[i + 1]) / 2 for i in np.flatnonzero(np.diff(outcomes))]

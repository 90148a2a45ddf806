"""What an assigner decides about one object's anchors, in a form that pictures and records share (imports no torch)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

Outcome = Literal["positive", "ignored", "negative"]
OUTCOMES: tuple[Outcome, ...] = ("positive", "ignored", "negative")  # a code in `Decision.outcomes` is a place here
FIRST_LEVEL = 3  # P3, the finest

Curves = Callable[[Float64[np.ndarray, " m"]], Mapping[str, Float64[np.ndarray, " m"]]]


class LevelMap(NamedTuple):
    """Numbers of every cell of one pyramid level with one object, on the image."""

    level: int  # 3..7
    first: Float64[np.ndarray, " 2"]  # centre of the upper left cell, (x, y) pixels
    step: Float64[np.ndarray, " 2"]  # from a cell to the next, pixels
    values: Mapping[str, Float64[np.ndarray, "h w"]]  # by their names, the same on all levels


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
    maps: Sequence[LevelMap] = ()  # from the finest level

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


def anchor_levels(anchors: Int64[np.ndarray, " n"], level_sizes: Sequence[int]) -> Int64[np.ndarray, " n"]:
    """Pyramid level, 3 for the finest, of anchors by their number; `level_sizes` are the anchors of each level."""
    return FIRST_LEVEL + np.searchsorted(np.cumsum(level_sizes), anchors, side="right")


def level_maps(
    values: Mapping[str, Float64[np.ndarray, " A"]],
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    centre_offset: float = 0.0,
) -> list[LevelMap]:
    """Numbers of all anchors as maps, one anchor for each cell.

    Args:
        values: by name, of all anchors, level by level from the finest, inside a level row by row.
        shapes: height and width of each level in cells.
        strides: of each level, pixels.
        centre_offset: of a cell's centre, in strides; the geometry's.
    """
    maps, start = [], 0
    for number, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
        part = slice(start, start + height * width)
        level = {name: numbers[part].reshape(height, width) for name, numbers in values.items()}
        first, step = np.full(2, centre_offset * stride), np.full(2, float(stride))
        maps.append(LevelMap(FIRST_LEVEL + number, first, step, level))
        start = part.stop
    return maps

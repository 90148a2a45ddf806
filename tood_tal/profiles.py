"""Where published implementations of TOOD differ in method (imports no torch).

Spec section 0. `ours` is its default column: the authors' method with MMDetection's guards and the paper's test rule.
"""

from dataclasses import dataclass, replace
from typing import Literal

from core.profiles import ProfileName

NormaliserRule = Literal["global", "average"]


@dataclass(frozen=True)
class TOODProfile:
    """TOOD's own switches; one row of the table in `tood_tal/README.md` each."""

    # network
    revert_inside_out: bool  # a box that the sampling turns inside out goes back to its un-sampled place
    # losses
    normaliser: NormaliserRule  # sums over ranks floored and then averaged, or averaged and then floored
    norm_floor: float  # a normaliser below it becomes 1
    learn_padding: bool  # anchors in the padding are negatives of the second phase; otherwise they take no part
    # test
    best_locations: bool  # a level keeps its best anchors, then the threshold; otherwise its best (anchor, class) pairs
    clip: bool  # boxes are cut to their image
    drop_empty_boxes: bool  # detections without area are dropped


OURS = TOODProfile(
    revert_inside_out=True,
    normaliser="global",
    norm_floor=1.0,
    learn_padding=False,
    best_locations=False,
    clip=True,
    drop_empty_boxes=True,
)
TOOD_PROFILES: dict[ProfileName, TOODProfile] = {
    "ours": OURS,
    "mmdet": replace(OURS, normaliser="average", clip=False),
    "official": replace(
        OURS,
        revert_inside_out=False,
        normaliser="average",
        norm_floor=1e-12,
        learn_padding=True,
        best_locations=True,
        drop_empty_boxes=False,
    ),
}

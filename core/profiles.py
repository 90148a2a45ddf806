"""Whose implementation a model follows: ours, MMDetection's or the authors' (imports no torch).

A profile names every architecture and data switch in which the published implementations differ. What only one method
switches (assignment, score, thresholds) stands in that method's own `profiles.py` under the same three names.
"""

from dataclasses import dataclass
from typing import Literal

ProfileName = Literal["ours", "mmdet", "official"]


@dataclass(frozen=True)
class Profile:
    """Switches shared by all methods; one row of the table in `core/README.md` each."""

    caffe2_backbone: bool  # stride in the 1x1, BGR, mean only, batch norm without epsilon, everything in it frozen
    relu_before_p7: bool  # P7 reads ReLU(P6)
    tower_bias: bool  # tower convolutions carry a bias beside their GroupNorm
    clamp_both_sides: bool  # predicted log sizes clamped to +-ln(1000/16); otherwise only from above
    exclude_padding: bool  # anchors beyond an image's own size rounded up to 32 take no part in training
    truncate_resized: bool  # resized side int(short * ratio) as the authors, otherwise int(side * factor + 0.5)


PROFILES: dict[str, Profile] = {
    "ours": Profile(
        caffe2_backbone=False,
        relu_before_p7=False,
        tower_bias=False,
        clamp_both_sides=True,
        exclude_padding=True,
        truncate_resized=False,
    ),
    "mmdet": Profile(
        caffe2_backbone=False,
        relu_before_p7=False,
        tower_bias=False,
        clamp_both_sides=True,
        exclude_padding=True,
        truncate_resized=False,
    ),
    "official": Profile(
        caffe2_backbone=True,
        relu_before_p7=True,
        tower_bias=True,
        clamp_both_sides=False,
        exclude_padding=False,
        truncate_resized=True,
    ),
}

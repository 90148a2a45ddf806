"""Where published implementations of each host differ in method (imports no torch).

One `HostProfile` for each host and profile; spec sections 2, 5 and 9. `ours` takes the authors' choice with floors that
keep 0 / 0 out. Combined IoUs on GFLV2 and VFNet were never published as code: their rows are those of the hosts.
"""

from dataclasses import dataclass, replace
from typing import Literal

from core.profiles import ProfileName

NormaliserRule = Literal["global", "average"]


@dataclass(frozen=True)
class HostProfile:
    """A host's own switches; one row of the table in `dynamic_atss/README.md` each."""

    # losses
    normaliser: NormaliserRule  # sums over ranks floored and then averaged, or averaged and then floored
    count_empty_images: bool  # an image without positives counts as one positive where the class loss is divided
    weight_floor: float  # smallest divisor of the box loss, where the weights of all positives sum to 0
    giou_eps: float  # that keep GIoU's two ratios finite ...
    giou_floor: bool  # ... as a floor of both areas; otherwise added to them
    iou_floor: float  # smallest IoU target and weight of a positive
    learn_padding: bool  # anchors in the padding are negatives of the class loss; otherwise they take no part
    # test
    root_of_score: bool  # sqrt(class score * branch); otherwise the product
    rank_on_class: bool  # a level's best pairs are those of the highest class score, without the branch
    best_locations: bool  # a level keeps its best anchors by class, then the threshold; otherwise its best pairs
    keep_ties: bool  # detections exactly as good as the last of the best 100 stay too
    drop_empty_boxes: bool  # detections that clipping leaves without area are dropped


# Of implementations that have no floor; this one turns their 0 / 0 into 0 and changes nothing else.
NO_FLOOR = 1e-12

ATSS_OURS = HostProfile(
    normaliser="global",
    count_empty_images=False,
    weight_floor=1e-6,
    giou_eps=1e-7,
    giou_floor=False,
    iou_floor=0.0,
    learn_padding=False,
    root_of_score=True,
    rank_on_class=False,
    best_locations=False,
    keep_ties=True,
    drop_empty_boxes=True,
)
ATSS_MMDET = replace(
    ATSS_OURS,
    normaliser="average",
    count_empty_images=True,
    weight_floor=1.0,
    giou_eps=1e-6,
    giou_floor=True,
    root_of_score=False,
    rank_on_class=True,
    keep_ties=False,
)
# The branch-less hosts rank by their one score; the root is of the branch, so these two switches do nothing there.
GFL_OURS = replace(ATSS_OURS, count_empty_images=True, giou_eps=1e-6, giou_floor=True, keep_ties=False)
GFL_MMDET = ATSS_MMDET
GFL_OFFICIAL = replace(ATSS_MMDET, weight_floor=NO_FLOOR, best_locations=True, drop_empty_boxes=False)
VFNET_OURS = replace(GFL_OURS, count_empty_images=False, weight_floor=1.0, iou_floor=1e-6, learn_padding=True)
VFNET_MMDET = replace(ATSS_MMDET, count_empty_images=False, iou_floor=1e-6, learn_padding=True)

HOST_PROFILES: dict[str, dict[ProfileName, HostProfile]] = {
    "atss": {
        "ours": ATSS_OURS,
        "mmdet": ATSS_MMDET,
        "official": replace(ATSS_OURS, normaliser="average", weight_floor=NO_FLOOR, drop_empty_boxes=False),
    },
    "gfl": {"ours": GFL_OURS, "mmdet": GFL_MMDET, "official": GFL_OFFICIAL},
    "gflv2": {"ours": GFL_OURS, "mmdet": GFL_MMDET, "official": GFL_OFFICIAL},
    "vfnet": {
        "ours": VFNET_OURS,
        "mmdet": VFNET_MMDET,
        "official": replace(VFNET_MMDET, best_locations=True, drop_empty_boxes=False),
    },
}

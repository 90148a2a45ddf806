"""Where the authors' PAA and MMDetection's differ in method (imports no torch).

Each row of spec PAA sections 0 and 14 that only PAA needs is a field here; the architecture and data switches that
other methods share stand in `core/profiles.py`. `ours` takes the authors' choice everywhere, with three corrections
that no normal COCO batch feels: normalisers do not depend on the number of ranks where there are fewer positives than
ranks, that of the box loss has a floor, and boxes without area are dropped at test. In all profiles an image without
objects is all negative (the authors' code stops with an error there).
"""

from dataclasses import dataclass, replace
from typing import Literal

from core.profiles import ProfileName

LowQualityRule = Literal["own", "overwrite"]
NormaliserRule = Literal["global", "average", "local"]
Scheme = Literal["a", "b", "c", "d", "number", "range"]


@dataclass(frozen=True)
class PaaProfile:
    """PAA's own switches; one row of the table in `paa/README.md` each."""

    # assignment, section 3.1
    low_quality: LowQualityRule  # an object's best anchors keep their own best object, or are given to that object
    score_box_weight: float  # lambda_1 of the GIoU loss inside the anchor score, Eq. 3; 1.3 leaks in from Eq. 8
    keep_single: bool  # an object with one candidate takes it as positive; otherwise it gets none
    first_component_only: bool  # candidates of component 1 below the density peak are negative, else positive
    all_without_first: bool  # where component 0 is empty all candidates are positive; otherwise none
    # losses, section 3.2
    normaliser: NormaliserRule  # of the losses: see `paa.losses.normalisers`
    count_images: bool  # the class loss is divided by at least the rank's number of images; otherwise by at least 1
    count_empty_images: bool  # an image without positives counts as one positive in the normalisers
    box_normaliser_floor: float  # smallest divisor of the box loss, where the IoUs of all positives sum to 0
    giou_eps: float  # square pixels that keep GIoU's two ratios finite ...
    giou_floor: bool  # ... as a floor of both areas; otherwise added to them
    # test, section 3.3
    root_of_score: bool  # a detection's score is sqrt(class score * IoU); otherwise the product
    threshold_on_class: bool  # the score threshold is put on the class score; otherwise on the detection's score
    top_over_pairs: bool  # a level's best before NMS are (anchor, class) pairs; otherwise anchors by their best class
    rank_on_class: bool  # a level's best are those of the highest class score; otherwise of the highest score
    keep_ties: bool  # detections exactly as good as the last of the best 100 stay too
    vote_in_original_pixels: bool  # NMS and score voting after resizing to the image file; otherwise before
    drop_empty_boxes: bool  # detections that clipping leaves without area are dropped


# Neither original has a floor; this one turns their 0 / 0 into 0 and changes nothing else.
NO_FLOOR = 1e-12

PAA_PROFILES: dict[ProfileName, PaaProfile] = {
    "ours": PaaProfile(
        low_quality="own",
        score_box_weight=1.0,
        keep_single=True,
        first_component_only=False,
        all_without_first=True,
        normaliser="global",
        count_images=False,
        count_empty_images=False,
        box_normaliser_floor=1e-6,
        giou_eps=1e-7,
        giou_floor=False,
        root_of_score=True,
        threshold_on_class=True,
        top_over_pairs=True,
        rank_on_class=False,
        keep_ties=True,
        vote_in_original_pixels=False,
        drop_empty_boxes=True,
    ),
    "mmdet": PaaProfile(
        low_quality="overwrite",
        score_box_weight=1.3,
        keep_single=False,
        first_component_only=True,
        all_without_first=False,
        normaliser="local",
        count_images=True,
        count_empty_images=False,
        box_normaliser_floor=NO_FLOOR,
        giou_eps=1e-6,
        giou_floor=True,
        root_of_score=True,
        threshold_on_class=False,
        top_over_pairs=False,
        rank_on_class=False,
        keep_ties=False,
        vote_in_original_pixels=True,
        drop_empty_boxes=False,
    ),
    "official": PaaProfile(
        low_quality="own",
        score_box_weight=1.0,
        keep_single=True,
        first_component_only=False,
        all_without_first=True,
        normaliser="average",
        count_images=False,
        count_empty_images=False,
        box_normaliser_floor=NO_FLOOR,
        giou_eps=1e-7,
        giou_floor=False,
        root_of_score=True,
        threshold_on_class=True,
        top_over_pairs=True,
        rank_on_class=False,
        keep_ties=True,
        vote_in_original_pixels=False,
        drop_empty_boxes=False,
    ),
}

# ATSS as a baseline (spec section 11): the authors of PAA forked ATSS, so only MMDetection's differ.
ATSS_PROFILES: dict[ProfileName, PaaProfile] = {
    **PAA_PROFILES,
    "mmdet": replace(
        PAA_PROFILES["mmdet"],
        normaliser="average",
        count_images=False,
        count_empty_images=True,
        box_normaliser_floor=1.0,
        root_of_score=False,
        threshold_on_class=True,
        top_over_pairs=True,
        rank_on_class=True,
        drop_empty_boxes=True,
    ),
}

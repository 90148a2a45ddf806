"""PAA's configuration and its named runs (imports no torch)."""

from dataclasses import dataclass, replace
from typing import Literal

from core.config import PyramidConfig
from paa.profiles import ATSS_PROFILES, PAA_PROFILES, PaaProfile, Scheme


@dataclass(frozen=True, kw_only=True)
class Config(PyramidConfig):
    """PAA with ResNet-50. Defaults are the paper's ablation run: 135,000 steps of 16 images."""

    steps: int | None = 135_000
    bias_lr_factor: float = 2.0  # the authors' recipe
    bias_weight_decay: float = 0.0  # the authors' recipe
    assigner: Literal["paa", "hard_iou", "atss"] = "paa"  # who chooses positives: Algorithm 1, a fixed IoU, ATSS
    prematch_iou: float = 0.1  # an anchor with a lower IoU to every object is no candidate
    anchor_scale: float = 8.0  # side of the square anchors in strides, Table 4
    topk: int = 9  # K, candidates an object keeps on each level: those of the lowest anchor score (ATSS: the nearest)
    scheme: Scheme = "c"  # what splits candidates: the mixture as in Fig. 3 a to d, a fixed number, a score range
    fixed_number: int = 9  # scheme number: an object's positives, those of the lowest anchor score
    score_range: float = 0.1  # scheme range: a candidate is positive if exp(-anchor score) is above
    quality: Literal["iou", "centerness", "none"] = "iou"  # what the branch beside the boxes predicts
    box_weight: float = 1.3  # lambda_1, weight of the box loss, Eq. 8
    quality_weight: float = 0.5  # lambda_2, weight of the loss of the IoU (or centre-ness) prediction, Eq. 8
    score_threshold: float = 0.05  # lowest score of a detection before NMS
    pre_nms_top: int = 1000  # candidates of each level that reach NMS
    nms_iou: float = 0.6  # a detection with a larger IoU to a better one of its class is dropped
    max_detections: int = 100  # of an image
    score_voting: bool = True  # refine kept boxes by their neighbours, section 3.3
    voting_sigma: float = 0.025  # width of the voting weight; the paper prints 0.0025, the authors' code has 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "topk", "fixed_number", "pre_nms_top", "max_detections")
        self._check_least(0, "box_weight", "quality_weight")
        for name in ("anchor_scale", "voting_sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("prematch_iou", "score_range", "score_threshold", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    @property
    def rules(self) -> PaaProfile:
        """PAA's own switches of `profile`, or those of ATSS where that is what is trained."""
        return (ATSS_PROFILES if self.assigner == "atss" else PAA_PROFILES)[self.profile]


SMALL = Config(
    backbone="resnet18",
    channels=96,
    short_side=192,
    long_side=320,
    steps=240,
    batch_size=8,
    empty_images="keep",
)

# Drawn images from random weights: the backbone learns with ordinary batch norm, anchors fit the small images, and many
# small steps at a high rate with bounded gradients learn more in the same time than the paper's few large ones.
QUICK = replace(
    SMALL,
    data="shapes",
    backbone_weights="none",
    frozen_stages=0,
    norm="batch",
    short_side=128,
    long_side=256,
    anchor_scale=4.0,
    steps=900,
    batch_size=4,
    lr=0.02,
    warmup="linear",
    warmup_factor=0.1,
    clip_grad_norm=5.0,
    milestones=(0.8, 0.95),
    log_every=50,
)

# The authors' longer runs: 180,000 steps of 16 images whose short side is drawn from 640 to 800 (spec section 8).
MULTI_SCALE = Config(steps=180_000, short_side_min=640)
R101 = replace(MULTI_SCALE, backbone="resnet101")
X101_64X4D = replace(MULTI_SCALE, backbone="resnext101_64x4d")
X101_32X8D = replace(MULTI_SCALE, backbone="resnext101_32x8d")
X152_32X8D = replace(
    MULTI_SCALE, backbone="resnext152_32x8d", steps=360_000, batch_size=8, paper_lr=0.005, paper_batch_size=8
)


def deformable(config: Config, *stages: int) -> Config:
    """The configuration with deformable convolutions in backbone stages and the last layer of both towers."""
    return replace(config, dcn_stages=stages, dcn_tower=True)


# Rows of the paper's tables 1 and 4 and of section 4.2: its ablation run with one thing changed each.
HARD_IOU = Config(assigner="hard_iou", quality="none", score_voting=False)
NO_VOTING = Config(score_voting=False)
ATSS = Config(assigner="atss", quality="centerness", box_weight=2.0, quality_weight=1.0, score_voting=False)
ABLATIONS = {
    "hard_iou": replace(HARD_IOU, box_weight=2.0),  # RetinaNet's rule, one anchor; about 34.6 (derived)
    "hard_iou_iou_prediction": replace(HARD_IOU, quality="iou"),
    "assignment_only": replace(NO_VOTING, quality="none"),  # 39.9
    "centerness": replace(NO_VOTING, quality="centerness"),  # "no gain" over assignment_only
    "no_voting": NO_VOTING,  # 40.8, later 40.9
    "scheme_a": Config(scheme="a"),
    "scheme_b": Config(scheme="b"),
    "scheme_d": Config(scheme="d"),
    "fixed_number_5": Config(scheme="number", fixed_number=5),
    "fixed_number_10": Config(scheme="number", fixed_number=10),
    "fixed_number_20": Config(scheme="number", fixed_number=20),
    "score_range_0p1": Config(scheme="range", score_range=0.1),
    "score_range_0p2": Config(scheme="range", score_range=0.2),
    "score_range_0p3": Config(scheme="range", score_range=0.3),  # the paper: fails to train
    "topk_5": Config(topk=5),
    "topk_7": Config(topk=7),
    "topk_11": Config(topk=11),
    "topk_13": Config(topk=13),
    "anchor_scale_5": Config(anchor_scale=5.0),
    "anchor_scale_6": Config(anchor_scale=6.0),
    "anchor_scale_7": Config(anchor_scale=7.0),
    "anchor_scale_9": Config(anchor_scale=9.0),
    "atss_centerness": ATSS,  # 39.4
    "atss_iou_prediction": replace(ATSS, quality="iou", box_weight=1.3, quality_weight=0.5),  # 39.8
}

PRESETS = {
    "r50_1p5x": Config(),  # 41.1 AP on COCO val2017 without scale jitter (authors' README, as the next)
    "r50_1x": Config(steps=90_000),  # 40.4
    "r101_2x_ms": R101,  # 44.6
    "x101_64x4d_2x_ms": X101_64X4D,  # 46.4
    "r101_dcn_2x_ms": deformable(R101, 3, 4, 5),  # 47.1
    "x101_64x4d_dcn_2x_ms": deformable(X101_64X4D, 4, 5),  # 48.8
    "x101_32x8d_dcn_2x_ms": deformable(X101_32X8D, 4, 5),  # 48.9
    "x152_32x8d_dcn_2x_ms": deformable(X152_32X8D, 4, 5),  # 50.5
    "small": SMALL,  # comparisons on a CPU
    "quick": QUICK,  # a few minutes on a CPU; what it reaches stands in README.md
    **ABLATIONS,
}

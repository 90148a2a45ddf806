"""PAA's configuration and its named runs (imports no torch)."""

from dataclasses import dataclass, replace
from typing import Literal

from core.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """PAA with ResNet-50. Defaults are the paper's ablation run: 135,000 steps of 16 images."""

    steps: int | None = 135_000
    bias_lr_factor: float = 2.0  # the authors' recipe
    bias_weight_decay: float = 0.0  # the authors' recipe
    prematch_iou: float = 0.1  # an anchor with a lower IoU to every object is no candidate
    anchor_scale: float = 8.0  # side of the square anchors in strides, Table 4
    topk: int = 9  # K, candidates an object keeps on each level, those with the lowest anchor score
    scheme: Literal["a", "b", "c", "d"] = "c"  # how the mixture separates positives from negatives, Fig. 3
    box_weight: float = 1.3  # lambda_1, weight of the box loss, Eq. 8
    iou_weight: float = 0.5  # lambda_2, weight of the IoU prediction loss, Eq. 8
    score_threshold: float = 0.05  # lowest score of a detection before NMS
    pre_nms_top: int = 1000  # candidates of each level that reach NMS
    nms_iou: float = 0.6  # a detection with a larger IoU to a better one of its class is dropped
    max_detections: int = 100  # of an image
    score_voting: bool = True  # refine kept boxes by their neighbours, section 3.3
    voting_sigma: float = 0.025  # width of the voting weight; the paper prints 0.0025, the authors' code has 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "topk", "pre_nms_top", "max_detections")
        self._check_least(0, "box_weight", "iou_weight")
        for name in ("anchor_scale", "voting_sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("prematch_iou", "score_threshold", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


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

PRESETS = {
    "r50_1p5x": Config(),  # 41.1 AP on COCO val2017 without scale jitter (authors' README)
    "r50_1x": Config(steps=90_000),  # 40.4 AP on COCO val2017 (authors' README)
    "small": SMALL,  # comparisons on a CPU
    "quick": QUICK,  # a few minutes on a CPU; what it reaches stands in README.md
}

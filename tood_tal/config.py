"""TOOD's configuration and its named runs (imports no torch)."""

from dataclasses import dataclass, replace
from typing import Literal

from core.config import PyramidConfig
from core.profiles import PROFILES, Profile
from tood_tal.profiles import TOOD_PROFILES, TOODProfile


@dataclass(frozen=True, kw_only=True)
class Config(PyramidConfig):
    """TOOD with ResNet-50, anchor-free: 12 epochs of 16 images (the paper's section 4)."""

    epochs: float | None = 12.0
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    warmup: Literal["constant", "linear"] = "linear"
    warmup_factor: float = 0.001  # lr's first factor
    dcn_tower: bool = False  # T-Head's first two convolutions, or the towers' last ones, become modulated deformable
    head: Literal["t_head", "parallel", "parallel_tap"] = "t_head"  # parallel_tap: two towers with T-Head's alignment
    anchor_based: bool = False  # boxes as deltas from anchors; otherwise as distances from their centres
    quality: Literal["none", "centerness"] = "none"  # head parallel: the branch of plain ATSS
    atss_share: float = 4 / 12  # fraction of the run that begins with ATSS's assignment, before TAL; 1: all of it
    atss_topk: int = 9  # there: candidates of an object on each level, its nearest anchors
    alpha: float = 1.0  # exponent of the class score in the alignment metric, Table 4
    beta: float = 6.0  # exponent of the IoU
    topk: int = 13  # m, anchors of largest metric offered to each object
    conflict: Literal["max_iou", "min_area"] = "max_iou"  # object that gets an anchor which several claim
    anchor_scale: float = 8.0  # side of the square anchors in strides
    score_threshold: float = 0.05  # lowest score of a detection before NMS
    pre_nms_top: int = 1000  # candidates of each level that reach NMS
    nms_iou: float = 0.6  # a detection with a larger IoU to a better one of its class is dropped
    max_detections: int = 100  # of an image

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "topk", "atss_topk", "pre_nms_top", "max_detections")
        for name in ("alpha", "beta", "anchor_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("atss_share", "score_threshold", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.quality != "none" and (self.head != "parallel" or self.atss_share < 1):
            raise ValueError(
                f"quality {self.quality} is plain ATSS's: it needs head parallel and atss_share 1, got head {self.head}"
                f" and atss_share {self.atss_share:.3g}"
            )
        if self.geometry != "modern":
            raise ValueError(f"TOOD exists in geometry modern only, got {self.geometry}")

    @property
    def switches(self) -> Profile:
        """The shared switches of `profile`: the authors built on MMDetection."""
        return PROFILES["mmdet"]

    @property
    def rules(self) -> TOODProfile:
        """TOOD's own switches of `profile`."""
        return TOOD_PROFILES[self.profile]

    def assigns_by_atss(self, step: int, steps: int) -> bool:
        """Whether a step, counted from 1, lies in the first phase (spec section 2.2)."""
        return step <= round(self.atss_share * steps)


# Table 5: 24 epochs, the first 4 of them with ATSS; short sides drawn from 480 to 800.
MULTI_SCALE = Config(epochs=24.0, milestones=(16 / 24, 22 / 24), atss_share=4 / 24, short_side_min=480)
R101 = replace(MULTI_SCALE, backbone="resnet101")
X101 = replace(MULTI_SCALE, backbone="resnext101_64x4d")

# Tables 1 and 2: the four cells of head and assignment; the 18 epochs drop the rate where the 12 do (a choice of ours).
PARALLEL_ATSS = Config(head="parallel", quality="centerness", atss_share=1.0)
T_HEAD_ATSS = Config(atss_share=1.0)
PARALLEL_TAL = Config(head="parallel")
PARALLEL_TAL_18 = replace(PARALLEL_TAL, epochs=18.0, atss_share=4 / 18)
ABLATIONS = {
    "parallel_atss": PARALLEL_ATSS,  # 39.2
    "parallel_atss_anchor_based": replace(PARALLEL_ATSS, anchor_based=True),  # 39.3
    "t_head_atss": T_HEAD_ATSS,  # 41.1
    "t_head_atss_anchor_based": replace(T_HEAD_ATSS, anchor_based=True),  # 41.1
    "parallel_tal": PARALLEL_TAL,  # 40.3
    "parallel_tal_18e": PARALLEL_TAL_18,  # 40.9
    "parallel_tap_18e": replace(PARALLEL_TAL_18, head="parallel_tap"),  # 42.5
    # Table 4
    "alpha_0p5_beta_2": Config(alpha=0.5, beta=2.0),  # 42.4
    "alpha_0p5_beta_4": Config(alpha=0.5, beta=4.0),  # 42.3
    "alpha_0p5_beta_6": Config(alpha=0.5),  # 41.7
    "alpha_1_beta_8": Config(beta=8.0),  # 42.2
    "alpha_1p5_beta_8": Config(alpha=1.5, beta=8.0),  # 41.5
    # m: 42.0 to 42.5, the paper prints no number of its own for each
    "topk_5": Config(topk=5),
    "topk_9": Config(topk=9),
    "topk_17": Config(topk=17),
    "topk_21": Config(topk=21),
    # length of the first phase: about 41.8 without it in MMDetection, the others are ours
    "no_atss_phase": Config(atss_share=0.0),
    "atss_1_epoch": Config(atss_share=1 / 12),
    "atss_2_epochs": Config(atss_share=2 / 12),
    "atss_8_epochs": Config(atss_share=8 / 12),
    # the supplement's rule for an anchor that several objects claim
    "conflict_min_area": Config(conflict="min_area"),
}

SMALL = Config(
    backbone="resnet18",
    channels=96,
    short_side=192,
    long_side=320,
    steps=240,
    epochs=None,
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
    warmup_factor=0.1,
    clip_grad_norm=5.0,
    milestones=(0.8, 0.95),
    log_every=50,
)

PRESETS = {
    "r50_1x": Config(),  # 42.5 AP on COCO val2017 (Table 3)
    "r50_anchor_based_1x": Config(anchor_based=True),  # 42.4
    "r50_2x_ms": MULTI_SCALE,  # 44.5 in MMDetection
    "r101_2x_ms": R101,  # 46.7 on test-dev (Table 5, as the next)
    "r101_dcn_2x_ms": replace(R101, dcn_stages=(3, 4, 5), dcn_tower=True),  # 49.6
    "x101_64x4d_2x_ms": X101,  # 48.3
    "x101_64x4d_dcn_2x_ms": replace(X101, dcn_stages=(4, 5), dcn_tower=True),  # 51.1
    "small": SMALL,  # comparisons on a CPU
    "quick": QUICK,  # a few minutes on a CPU
    **ABLATIONS,
}

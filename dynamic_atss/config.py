"""Dynamic ATSS's configuration and its named runs (imports no torch)."""

from dataclasses import dataclass, replace
from typing import Literal

from core.config import PyramidConfig
from core.profiles import PROFILES, Profile
from dynamic_atss.profiles import HOST_PROFILES, HostProfile

Host = Literal["atss", "gfl", "gflv2", "vfnet"]


@dataclass(frozen=True, kw_only=True)
class Config(PyramidConfig):
    """The paper's best ATSS: Combined IoUs, quality focal loss, IoU branch, 90,000 steps of 16 images."""

    steps: int | None = 90_000
    bias_lr_factor: float = 2.0  # the authors' recipe
    bias_weight_decay: float = 0.0  # the authors' recipe
    host: Host = "atss"  # detector whose assignment is made dynamic
    pred_weight: float = 1.0  # w_p of the predicted IoU in the Combined IoU, Table 3; 0: plain ATSS
    pred_schedule: Literal["constant", "up"] = "constant"  # up: pred_weight * step / steps, D_up of Table 3
    anchor_weight: float = 1.0  # w_a of the anchor's IoU; 0: predicted IoUs only, Table 2
    anchor_schedule: Literal["constant", "down"] = "constant"  # down: anchor_weight * (1 - step / steps), D_down
    pred_source: Literal["refined", "initial"] = "refined"  # host vfnet: the boxes whose IoU is the predicted one
    topk: int = 9  # k, candidates of an object on each level: its nearest anchors
    class_loss: Literal["focal", "qfl", "vfl"] = "qfl"  # host atss: focal, quality focal or varifocal loss
    quality: Literal["centerness", "iou"] = "iou"  # host atss: what the branch beside the boxes predicts
    anchor_scale: float = 8.0  # side of the square anchors in strides
    score_threshold: float = 0.05  # lowest class score of a detection before NMS
    pre_nms_top: int = 1000  # candidates of each level that reach NMS
    nms_iou: float = 0.6  # a detection with a larger IoU to a better one of its class is dropped
    max_detections: int = 100  # of an image

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "topk", "pre_nms_top", "max_detections")
        self._check_least(0, "pred_weight", "anchor_weight")
        if not self.anchor_scale > 0:
            raise ValueError(f"anchor_scale must be above 0, got {self.anchor_scale}")
        if self.pred_weight == self.anchor_weight == 0:
            raise ValueError("pred_weight and anchor_weight must not both be 0")
        if self.pred_weight == 0 and self.anchor_schedule == "down":
            raise ValueError("anchor_schedule down ends with a weight of 0, so pred_weight must be above 0")
        for name in ("score_threshold", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.host != "atss" and self.geometry != "modern":
            raise ValueError(f"host {self.host} exists in geometry modern only, got {self.geometry}")

    @property
    def switches(self) -> Profile:
        """The shared switches of `profile`; the authors of GFLV2 and VFNet built on MMDetection."""
        shared = PROFILES[self.profile if self.host == "atss" else "mmdet"]
        return replace(shared, relu_before_p7=True) if self.host == "vfnet" else shared

    @property
    def rules(self) -> HostProfile:
        """The host's own switches of `profile`."""
        return HOST_PROFILES[self.host][self.profile]

    def weights_at(self, step: int, steps: int) -> tuple[float, float]:
        """w_p and w_a of a step, counted from 1 (Table 3): D_up = step / steps, D_down = 1 - step / steps."""
        # constant weights never touch the step: a compiled criterion would be traced again for every value of it
        rising = step / steps if self.pred_schedule == "up" else 1.0
        falling = 1 - step / steps if self.anchor_schedule == "down" else 1.0
        return self.pred_weight * rising, self.anchor_weight * falling


# Rows of Table 5: the paper's best with larger backbones; 2x runs draw short sides from 640 to 800 (spec section 4).
MULTI_SCALE = Config(steps=180_000, short_side_min=640)
R50_DCN = replace(Config(), dcn_stages=(3, 4, 5), dcn_tower=True)
R101 = replace(MULTI_SCALE, backbone="resnet101")
R101_DCN = replace(R101, dcn_stages=(3, 4, 5), dcn_tower=True)
X101_64X4D = replace(MULTI_SCALE, backbone="resnext101_64x4d")
X101_64X4D_DCN = replace(X101_64X4D, dcn_stages=(4, 5), dcn_tower=True)
X101_32X8D_DCN = replace(X101_64X4D_DCN, backbone="resnext101_32x8d")


def plain_atss(config: Config) -> Config:
    """ATSS as published: its own assignment, focal loss and centre-ness."""
    return replace(config, pred_weight=0.0, class_loss="focal", quality="centerness")


# Tables 1 to 3: ResNet-50, 90,000 steps; one thing changed each.
ATSS = plain_atss(Config())
COMBINED = replace(ATSS, pred_weight=1.0)
ABLATIONS = {
    "atss_qfl_r50_1x": replace(ATSS, class_loss="qfl"),  # 39.6
    "atss_vfl_r50_1x": replace(ATSS, class_loss="vfl"),  # 39.7
    "predicted_only": replace(COMBINED, anchor_weight=0.0),  # 29.4
    "combined": COMBINED,  # 39.8
    "combined_qfl": replace(COMBINED, class_loss="qfl"),  # 40.1
    "combined_vfl": replace(COMBINED, class_loss="vfl"),  # 39.8
    "combined_vfl_iou": Config(class_loss="vfl"),  # 40.2
    "weights_0p5_1": replace(COMBINED, pred_weight=0.5),  # 39.4
    "weights_1p5_1": replace(COMBINED, pred_weight=1.5),  # 39.6
    "weights_1_0p5": replace(COMBINED, anchor_weight=0.5),  # 39.4
    "weights_1_1p5": replace(COMBINED, anchor_weight=1.5),  # 39.5
    "weights_up_1": replace(COMBINED, pred_schedule="up"),  # 39.2
    "weights_1_down": replace(COMBINED, anchor_schedule="down"),  # 35.1
    "weights_up_down": replace(COMBINED, pred_schedule="up", anchor_schedule="down"),  # 35.6
}

# Table 4: the hosts' own 1x recipes (spec section 4); the paper does not state those of its two rows.
GFLV2 = Config(
    host="gflv2",
    steps=None,
    epochs=12.0,
    milestones=(8 / 12, 11 / 12),
    bias_lr_factor=1.0,
    bias_weight_decay=1e-4,
    warmup="linear",
    warmup_factor=0.001,
)
VFNET = replace(GFLV2, host="vfnet", bias_lr_factor=2.0, bias_weight_decay=0.0, warmup_factor=0.1)

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
    "r50_1x": Config(),  # 40.3 AP on COCO val2017 (the paper's Table 2)
    "r50_dcn_1x": R50_DCN,  # 44.4 on test-dev (Table 5, as the next)
    "r101_2x_ms": R101,  # 44.7
    "r101_dcn_2x_ms": R101_DCN,  # 47.3
    "x101_64x4d_2x_ms": X101_64X4D,  # 46.5
    "x101_32x8d_dcn_2x_ms": X101_32X8D_DCN,  # 48.6
    "x101_64x4d_dcn_2x_ms": X101_64X4D_DCN,  # 48.6
    "atss_r50_1x": ATSS,  # 39.1 on val2017 (Table 1), 39.2 on test-dev
    "atss_r50_dcn_1x": plain_atss(R50_DCN),  # 43.0 on test-dev
    "atss_r101_2x_ms": plain_atss(R101),  # 43.6
    "atss_r101_dcn_2x_ms": plain_atss(R101_DCN),  # 46.3
    "atss_x101_64x4d_2x_ms": plain_atss(X101_64X4D),  # 45.6
    "atss_x101_32x8d_dcn_2x_ms": plain_atss(X101_32X8D_DCN),  # 47.7
    "atss_x101_64x4d_dcn_2x_ms": plain_atss(X101_64X4D_DCN),  # 47.7
    "gflv2_r50_1x": replace(GFLV2, pred_weight=0.0),  # 40.6 on val2017 (Table 4, as the next)
    "gflv2_combined_r50_1x": GFLV2,  # 41.1
    "vfnet_r50_1x": replace(VFNET, pred_weight=0.0),  # 41.3
    "vfnet_combined_r50_1x": VFNET,  # 41.6
    "small": SMALL,  # comparisons on a CPU
    "quick": QUICK,  # a few minutes on a CPU
    **ABLATIONS,
}

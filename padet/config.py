"""PADet's configuration and its named runs (imports no torch)."""

from dataclasses import dataclass, replace
from typing import Literal

from core.config import ResizeRule, TrainConfig

AnchorRow = Literal["coco", "voc"]
BackboneName = Literal["vgg16", "resnet18", "resnet34", "resnet50", "resnet101"]
Fam = Literal["none", "implicit", "explicit_l", "explicit_s", "explicit_ls", "disentangled"]

SIZES = (192, 384, 512)  # of the square input, pixels
FINEST_STRIDE = 8  # of the first level, pixels


def level_sides(size: int) -> tuple[int, ...]:
    """Cells of every level along either axis: 48, 24, 12, 6, 3, 1 at 384 and 64, 32, 16, 8, 4, 2, 1 at 512.

    The first level has stride 8; each further one halves it, down to 3 x 3 or 2 x 2, which the last level pools into
    one cell (spec section 1.1). So 192, which is ours for small machines, has 24, 12, 6, 3, 1.
    """
    sides = [size // FINEST_STRIDE]
    while sides[-1] > 3:
        sides.append(sides[-1] // 2)
    return (*sides, 1)


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """PADet with VGG-16 at 384 x 384. Defaults are the paper's run: 160 epochs of batches of 32 images."""

    # data
    size: int = 384  # side of the square that images are resized to, pixels: 192, 384 or 512
    augment: Literal["ssd", "none"] = "ssd"  # training images: SSD's augmentation, or only resized and mirrored
    # model
    backbone: BackboneName = "vgg16"  # network below the decoder; vgg16 is SSD's, with reduced fully connected layers
    pixels: Literal["imagenet", "caffe"] = "imagenet"  # what the backbone's weights expect; caffe: BGR minus means
    block_norm: Literal["batch", "frozen"] = "batch"  # batch norm after the backbone: learned, or stored statistics
    anchors: AnchorRow = "coco"  # anchor sizes of SSD for COCO or for PASCAL VOC, which are larger
    apm_score: bool = True  # APM scores anchors; easy negatives take no part in detection, Table 2 APM_C
    apm_box: bool = True  # APM moves and reshapes anchors, Table 2 APM_R
    fam: Fam = "disentangled"  # what the offsets of aligned features come from, Table 1
    fam_detach: bool = False  # offsets give the APM boxes no gradient; the paper trains end to end
    prior: float = 0.02  # initial APM score, and initial class probability of an object; 0: biases start at 0
    # assignment and losses
    positive_iou: float = 0.5  # an anchor with this IoU to an object or more is positive
    negative_iou: float = 0.3  # an anchor with a lower IoU to every object is negative; between the two it is ignored
    theta: float = 0.01  # a negative with a lower APM score is ignored by detection; at test every anchor
    apm_neg_pos_ratio: float = 0.0  # hardest negatives kept for each positive of an image, APM score; 0: all
    neg_pos_ratio: float = 0.0  # the same for the classes, after theta's filter
    # test
    score_threshold: float = 0.01  # lowest class score of a detection before soft-NMS
    nms: Literal["linear", "gaussian"] = "linear"  # how soft-NMS lowers the scores of overlapping boxes
    nms_iou: float = 0.3  # linear: a larger IoU to a better box of the class lowers the score
    nms_sigma: float = 0.5  # gaussian: its width
    score_floor: float = 0.001  # a detection whose score soft-NMS lowers below it is dropped
    pre_nms_top: int = 1000  # candidates of each class of an image that reach soft-NMS
    max_detections: int = 300  # of an image
    # schedule and optimiser
    epochs: float | None = 160.0
    batch_size: int = 32
    milestones: tuple[float, ...] = (100 / 160, 140 / 160)  # fractions of the run at which lr drops
    warmup: Literal["constant", "linear"] = "linear"
    warmup_epochs: float | None = 5.0
    warmup_factor: float = 1e-6 / 2e-3  # first lr 1e-6
    paper_lr: float = 2e-3
    paper_batch_size: int = 32
    weight_decay: float = 5e-4
    bias_weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in SIZES:
            raise ValueError(
                f"size must be {SIZES[0]}, {SIZES[1]} or {SIZES[2]}: levels of size / 8 cells are halved down to"
                f" 3 x 3 or 2 x 2, then pooled to 1 x 1, got {self.size}"
            )
        self._check_least(1, "pre_nms_top", "max_detections")
        self._check_least(0, "apm_neg_pos_ratio", "neg_pos_ratio")
        for name in ("positive_iou", "negative_iou", "theta", "score_threshold", "nms_iou", "score_floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou {self.negative_iou} is larger than positive_iou {self.positive_iou}")
        if not self.nms_sigma > 0:
            raise ValueError(f"nms_sigma must be above 0, got {self.nms_sigma}")
        self._check_model()

    def _check_model(self) -> None:
        if self.prior and not self.theta < self.prior < 1:
            raise ValueError(
                f"prior must be 0 or in (theta, 1), or no negative would ever learn, got {self.prior} and theta"
                f" {self.theta}"
            )
        if not self.apm_box and self.fam not in ("none", "implicit"):
            raise ValueError(f"fam {self.fam} reads the APM's boxes: set apm_box, or fam none or implicit")
        if self.backbone == "vgg16" and self.norm == "batch":
            raise ValueError("backbone vgg16 has no batch norm to train: norm must be frozen, got batch")
        if self.backbone != "vgg16" and self.pixels == "caffe":
            raise ValueError(f"pixels caffe are those of VGG-16's Caffe weights, got backbone {self.backbone}")

    @property
    def resize_rule(self) -> ResizeRule:
        """Both sides become `size`; the ratio of the sides is not kept."""
        return "square"

    @property
    def scale(self) -> tuple[int, int]:
        """`size` twice."""
        return self.size, self.size


# Batch norm of the backbone learns where 8 images or more share a device, as in the paper's runs; otherwise use
# --norm frozen (spec section 1.3).
R101 = Config(backbone="resnet101", norm="batch")
BASELINE = Config(apm_score=False, apm_box=False, fam="none")

# Tables 1 and 2: VGG-16 at 384, one thing changed each; AP on COCO val2017.
ABLATIONS = {
    "baseline": BASELINE,  # 29.6, "vanilla DSSD"
    "apm_c": replace(BASELINE, apm_score=True),  # 31.0
    "apm_r": replace(BASELINE, apm_box=True),  # 30.6
    "apm": Config(fam="none"),  # 31.7, in Table 1 "w/o alignment"
    "fam_implicit": Config(fam="implicit"),  # 32.8
    "fam_explicit_l": Config(fam="explicit_l"),  # 33.6
    "fam_explicit_s": Config(fam="explicit_s"),  # 33.4
    "fam_explicit_ls": Config(fam="explicit_ls"),  # 34.1
    # rows that the paper does not have
    "baseline_mined": replace(BASELINE, neg_pos_ratio=3.0),  # with SSD's 3 negatives to a positive
    "fam_alone": replace(BASELINE, fam="implicit"),  # aligned features without APM, so from the features themselves
}

# The paper states no VOC schedule: RFBNet's with our warm-up (spec section 4.5).
VOC = Config(data="data/VOCdevkit", anchors="voc", epochs=250.0, milestones=(150 / 250, 200 / 250))

SMALL = Config(
    size=192,
    backbone="resnet18",
    norm="batch",
    channels=96,
    epochs=None,
    steps=240,
    batch_size=8,
    empty_images="keep",
)

# Drawn images from random weights: many small steps at a high rate with bounded gradients learn more in the same time
# than the paper's few large ones.
QUICK = replace(
    SMALL,
    data="shapes",
    backbone_weights="none",
    anchors="voc",
    steps=900,
    batch_size=4,
    lr=0.01,
    clip_grad_norm=5.0,
    milestones=(0.8, 0.95),
    log_every=50,
)

PRESETS = {
    "vgg16_384": Config(),  # 34.8 AP on COCO val2017, 35.2 on test-dev
    "vgg16_512": Config(size=512),  # 37.6, 37.6
    "r101_384": R101,  # 36.7, 36.9
    "r101_512": replace(R101, size=512),  # 39.6, 40.0
    # a quarter of the schedule, drops at 25 and 35 of 40 epochs; ours, no number of the paper belongs to it
    "vgg16_384_quarter": Config(epochs=40.0, milestones=(25 / 40, 35 / 40), warmup_epochs=1.0),
    "voc_vgg16_384": VOC,  # 82.0 AP50 on VOC 2007 test, 11 points
    "voc_vgg16_512": replace(VOC, size=512),  # 82.7
    "small": SMALL,  # comparisons on a CPU
    "quick": QUICK,  # a few minutes on a CPU
    **ABLATIONS,
}

"""What every training run can be told, method or not (imports no torch).

A method's `Config` extends `TrainConfig`, or `PyramidConfig` where it is one of the detectors on a pyramid P3 to P7;
its fields become flags (`core.cli`). A value here is the default of the papers' common recipe where they share one.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from core.geometry import GEOMETRIES, MODERN, Geometry, GeometryName
from core.profiles import PROFILES, Profile, ProfileName

BackboneName = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext152_32x8d",
]

# How an image gets its size in the network's input: by its short side, the ratio of the sides kept, and the other side
# rounded or cut down to whole pixels; or both sides made equal.
ResizeRule = Literal["round", "truncate", "square"]

ConfigType = TypeVar("ConfigType", bound="TrainConfig")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ABC):
    """A run's data, schedule, optimiser and hardware; a subclass says how images are resized."""

    # data
    data: str = "data/coco"  # COCO or VOC folder, dataset YAML, or the word shapes
    voc_one_based: bool = True  # corners in a VOC folder count pixels from 1 and belong to the box, as VOC's own do
    empty_images: Literal["skip", "keep"] = "skip"  # training images without boxes
    # model
    backbone: str = "resnet50"
    backbone_weights: str = "cached"  # torchvision's ImageNet weights: cached, or imagenet to download; a file; none
    norm: Literal["frozen", "batch"] = "frozen"  # backbone's batch norm: stored statistics, or learned from scratch
    channels: int = 256  # of pyramid and head
    weights: str = ""  # start from this model's weights (a checkpoint of the same method)
    # schedule
    steps: int | None = None  # length of the run in steps ...
    epochs: float | None = None  # ... or in passes over the training images; exactly one of the two
    batch_size: int = 16  # images over all ranks
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)  # fractions of the run at which lr drops
    lr_decay: float = 0.1  # factor of each drop
    warmup: Literal["constant", "linear"] = "constant"  # lr starts at warmup_factor * lr, flat or rising
    warmup_steps: int = 500  # its length, at most a tenth of the run ...
    warmup_epochs: float | None = None  # ... or in passes over the training images, from which a run counts the steps
    warmup_factor: float = 1 / 3  # lr's first factor
    # optimiser
    lr: float | None = None  # taken as it is; unset: paper_lr * batch_size / paper_batch_size
    paper_lr: float = 0.01  # at paper_batch_size
    paper_batch_size: int = 16  # images over all ranks of the paper's run
    momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-4  # of everything but biases
    bias_lr_factor: float = 1.0  # lr factor of parameters named bias
    bias_weight_decay: float = 1e-4  # weight decay of parameters named bias
    clip_grad_norm: float = 0.0  # largest gradient norm; 0: no clipping, as in the papers
    ema: float = 0.0  # decay of a moving average of the weights, which is then what is evaluated; 0: none
    # run
    preset: str = ""  # the named run this one began as; its name goes into the run folder's
    out: str = ""  # run folder; unset: runs/<method>/<preset>[-<data>]
    seed: int = 0  # initial weights, order, augmentation, drawn shapes
    eval_every: int = 0  # steps between evaluations on val; 0: only at the end
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 20  # steps between log lines
    picture_every: int = 0  # steps between pictures of what the method assigns; 0: none
    tensorboard: bool = False  # also write TensorBoard events into the run folder (pip install "anchorage[loggers]")
    # hardware
    device: str = "auto"  # cuda if there is one, else cpu
    workers: int = 2  # loader processes of each rank; 0: load in the training process
    rank_timeout: float = 10.0  # minutes that ranks wait for one that is stuck, before all end
    precision: Literal["fp32", "bf16"] = "fp32"  # of the network; losses and assignment are always float32
    accumulate: int = 1  # equal parts in which a rank's images pass the network: less memory, one more forward pass
    compile: bool = False  # torch.compile the network
    deterministic: bool = False  # deterministic kernels, one image per forward at evaluation

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"set exactly one of steps and epochs, got steps {self.steps} and epochs {self.epochs}")
        self._check_least(1, "batch_size", "accumulate", "channels", "save_every", "log_every", "paper_batch_size")
        self._check_least(
            0, "workers", "eval_every", "picture_every", "warmup_steps", "warmup_factor", "lr_decay", "momentum"
        )
        self._check_least(0, "weight_decay", "bias_lr_factor", "bias_weight_decay", "clip_grad_norm", "paper_lr")
        if self.lr is not None:
            self._check_least(0, "lr")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs < float("inf"):
            raise ValueError(f"warmup_epochs must be at least 0, got {self.warmup_epochs}")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m <= 1 for m in self.milestones):
            raise ValueError(f"milestones must be rising fractions of the run in (0, 1], got {self.milestones}")
        if not 0 < self.rank_timeout <= 10_000:
            raise ValueError(f"rank_timeout must be above 0 and at most 10,000 minutes, got {self.rank_timeout}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number of 64 bits, got {self.seed}")
        if self.steps is not None and self.steps > 10**9:
            raise ValueError(f"steps must be at most 10**9, got {self.steps}")

    def _check_least(self, least: int, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: `lr`, or the paper's scaled by the batch (Goyal et al. 2017, linear scaling)."""
        return self.lr if self.lr is not None else self.paper_lr * self.batch_size / self.paper_batch_size

    @property
    @abstractmethod
    def resize_rule(self) -> ResizeRule:
        """How an image gets its size in the network's input."""

    @property
    @abstractmethod
    def scale(self) -> tuple[int, int]:
        """Short side of an image at test and the limit of its long side, pixels; of a square both are its side."""

    @property
    def short_sides(self) -> tuple[int, int]:
        """Smallest and largest short side that training draws, pixels."""
        return self.scale[0], self.scale[0]

    @property
    def box_geometry(self) -> Geometry:
        """The constants of the box convention."""
        return MODERN

    @property
    def switches(self) -> Profile:
        """The switches in which the published implementations differ."""
        return PROFILES["ours"]

    @property
    def conventions(self) -> dict[str, str]:
        """What weights of this configuration fit besides its shapes; every checkpoint repeats it beside them."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PyramidConfig(TrainConfig):
    """What the detectors on ResNet and a pyramid P3 to P7 have in common: images that keep the ratio of their sides."""

    # data
    short_side: int = 800  # pixels; an image's short side is resized to it ...
    long_side: int = 1333  # ... unless its long side would exceed this
    short_side_min: int = 0  # multi-scale training draws short sides from here to short_side; 0: always short_side
    # model
    geometry: GeometryName = "modern"  # box convention, see core/geometry.py
    profile: ProfileName = "ours"  # whose implementation to follow, see core/profiles.py
    backbone: BackboneName = "resnet50"  # network below the pyramid
    dcn_stages: tuple[int, ...] = ()  # backbone stages 2..5 (C2..C5) whose 3x3 become modulated deformable
    dcn_groups: int = 1  # offset groups of those
    dcn_tower: bool = False  # the last convolution of both towers becomes modulated deformable
    frozen_stages: int = 2  # 0: none, 1: stem, 2: stem and C2, ... 5: everything

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "short_side", "long_side", "dcn_groups")
        if self.short_side > self.long_side:
            raise ValueError(f"short_side {self.short_side} is larger than long_side {self.long_side}")
        if not 0 <= self.short_side_min <= self.short_side:
            raise ValueError(f"short_side_min must be 0 to short_side {self.short_side}, got {self.short_side_min}")
        if self.channels % 32 or self.channels < 64:
            raise ValueError(
                f"channels must be a multiple of 32, GroupNorm's groups, of two channels or more, got {self.channels}"
            )
        if not 0 <= self.frozen_stages <= 5:
            raise ValueError(f"frozen_stages must be 0 to 5, got {self.frozen_stages}")
        if self.norm == "batch" and (self.frozen_stages or self.switches.caffe2_backbone):
            raise ValueError(
                f"norm batch trains every stage of a backbone of profile ours or mmdet, got frozen_stages"
                f" {self.frozen_stages} and profile {self.profile}"
            )
        if self.norm == "batch" and self.short_side < 64:
            raise ValueError(f"norm batch needs a short_side of 64 or more, got {self.short_side}")
        if not set(self.dcn_stages) <= {2, 3, 4, 5}:
            raise ValueError(f"dcn_stages must be among 2, 3, 4, 5, got {self.dcn_stages}")
        if self.backbone_weights == "none" and self.frozen_stages and not self.weights:
            raise ValueError(
                f"backbone_weights none means random stages, which must learn: set frozen_stages 0 (and norm batch), "
                f"got {self.frozen_stages}"
            )

    @property
    def resize_rule(self) -> ResizeRule:
        """`truncate` in the authors' profile."""
        return "truncate" if self.switches.truncate_resized else "round"

    @property
    def scale(self) -> tuple[int, int]:
        """`short_side` and `long_side`."""
        return self.short_side, self.long_side

    @property
    def short_sides(self) -> tuple[int, int]:
        """`short_side_min`, where it is set, to `short_side`."""
        return self.short_side_min or self.short_side, self.short_side

    @property
    def box_geometry(self) -> Geometry:
        """The constants of `geometry`."""
        return GEOMETRIES[self.geometry]

    @property
    def switches(self) -> Profile:
        """The shared switches of `profile`."""
        return PROFILES[self.profile]

    @property
    def conventions(self) -> dict[str, str]:
        """`profile` and `geometry`."""
        return {"profile": self.profile, "geometry": self.geometry}


def total_steps(config: TrainConfig, images: int) -> int:
    """Length of the run in optimiser steps, for a training set of that many images."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, round(config.epochs * images / config.batch_size))


def with_warmup_steps(config: ConfigType, images: int) -> ConfigType:
    """The configuration whose `warmup_steps` are its `warmup_epochs`, where these are set, of that many images."""
    if config.warmup_epochs is None:
        return config
    steps = round(config.warmup_epochs * images / config.batch_size)
    return replace(config, warmup_steps=steps)

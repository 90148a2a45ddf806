"""The parallel tower head that ATSS, PAA and Dynamic ATSS share (RetinaNet's, with a quality branch)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from core.anchors import STRIDES
from core.layers import Scale, conv_tower, head_conv

PRIOR = 0.01  # class score of every anchor at the start (RetinaNet, section 4.1)
PRIOR_LOGIT = -math.log((1 - PRIOR) / PRIOR)  # -4.59512, the bias that gives it


class HeadOutputs(NamedTuple):
    """What the head says about every anchor, levels from the finest, inside a level row by row."""

    logits: Float[Tensor, "B A C"]  # class scores before the sigmoid
    deltas: Float[Tensor, "B A 4"]  # box regression relative to the anchor
    quality: Float[Tensor, "B A"] | None  # IoU or centre-ness before the sigmoid; None without the branch
    shapes: tuple[tuple[int, int], ...]  # height, width of each level in cells


class ParallelHead(nn.Module):
    """Two towers over every level: one for classes, one for boxes and their quality (spec PAA section 1).

    Args:
        channels: width of pyramid and towers, a multiple of 32.
        num_classes: C.
        tower_bias: tower convolutions carry a bias beside their GroupNorm (the authors' code; MMDetection has none).
        dcn_tower: the last convolution of both towers is modulated deformable.
        quality: predict the box's quality (PAA: IoU; ATSS: centre-ness) from the box tower.
    """

    def __init__(
        self, channels: int, num_classes: int, *, tower_bias: bool, dcn_tower: bool = False, quality: bool = True
    ) -> None:
        super().__init__()
        self.cls_tower = conv_tower(channels, tower_bias, dcn_tower)
        self.box_tower = conv_tower(channels, tower_bias, dcn_tower)
        self.cls_logits = class_conv(channels, num_classes)
        self.bbox_pred = head_conv(channels, 4)
        self.quality = head_conv(channels, 1) if quality else None
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)

    def forward(self, features: list[Float[Tensor, "B _ _ _"]]) -> HeadOutputs:
        """Predictions of all levels; one feature map per stride."""
        logits, deltas, quality = [], [], []
        for feature, scale in zip(features, self.scales, strict=True):
            logits.append(rows(self.cls_logits(self.cls_tower(feature))))
            box_feature = self.box_tower(feature)
            deltas.append(rows(scale(self.bbox_pred(box_feature))))
            if self.quality is not None:
                quality.append(rows(self.quality(box_feature)))
        shapes = tuple((feature.shape[2], feature.shape[3]) for feature in features)
        all_quality = torch.cat(quality, dim=1)[..., 0] if quality else None
        return HeadOutputs(torch.cat(logits, dim=1), torch.cat(deltas, dim=1), all_quality, shapes)


def class_conv(channels: int, num_classes: int) -> nn.Conv2d:
    """The last convolution of a class tower; every score starts at 0.01 (RetinaNet, section 4.1)."""
    conv = head_conv(channels, num_classes)
    assert conv.bias is not None
    nn.init.constant_(conv.bias, PRIOR_LOGIT)
    return conv


def rows(maps: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H*W C"]:
    """One row per cell, row by row: the order of `core.anchors`. No copy of channels_last maps."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)

"""The hosts' heads: GFL's distributions with GFLV2's quality predictor, VFNet's star-shaped refinement.

The ATSS host uses `core.heads.ParallelHead`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from core.anchors import STRIDES
from core.heads import class_conv, rows
from core.layers import HEAD_INIT_STD, Scale, conv_tower, head_conv

REG_MAX = 16  # largest side of GFL's boxes in strides; REG_MAX + 1 bins (GFL, section 4)
DGQP_TOP = 4  # probabilities of each side that GFLV2's predictor sees (GFLV2, section 3.2)
DGQP_WIDTH = 64  # its hidden channels
VFNET_DEPTH = 3  # convolutions of VFNet's towers
STAR_GRADIENT = 0.1  # share of the gradient that reaches the first box through the star's offsets (authors' code)
SIDE_SCALE = 8.0  # VFNet's first distances are exp(.) of 8 strides


class HeadOutputs(NamedTuple):
    """What a head says about every anchor, levels from the finest, inside a level row by row."""

    logits: Float[Tensor, "B A C"]  # class scores before the sigmoid
    regression: Float[Tensor, "B A R"]  # GFL: 4 * 17 bin logits, sides l, t, r, b; VFNet: l, t, r, b in pixels
    quality: Float[Tensor, "B A"] | None  # GFLV2: predicted quality before the sigmoid
    refined: Float[Tensor, "B A 4"] | None  # VFNet: refined l, t, r, b in pixels
    shapes: tuple[tuple[int, int], ...]  # height, width of each level in cells


class GFLHead(nn.Module):
    """Two towers; sides as distributions over 17 bins (GFL, section 3.2), and their shape as quality (GFLV2, 3.2).

    Args:
        channels: width of pyramid and towers, a multiple of 32.
        num_classes: C.
        quality: GFLV2's distribution-guided quality predictor.
        dcn_tower: the last convolution of both towers is modulated deformable.
    """

    def __init__(self, channels: int, num_classes: int, *, quality: bool, dcn_tower: bool = False) -> None:
        super().__init__()
        self.cls_tower = conv_tower(channels, False, dcn_tower)
        self.box_tower = conv_tower(channels, False, dcn_tower)
        self.cls_logits = class_conv(channels, num_classes)
        self.bbox_pred = head_conv(channels, 4 * (REG_MAX + 1))
        self.quality = quality_predictor() if quality else None
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)

    def forward(self, features: list[Float[Tensor, "B _ _ _"]]) -> HeadOutputs:
        """Predictions of all levels; one feature map per stride."""
        logits, bins, quality = [], [], []
        for feature, scale in zip(features, self.scales, strict=True):
            logits.append(rows(self.cls_logits(self.cls_tower(feature))))
            level = scale(self.bbox_pred(self.box_tower(feature))).float()
            bins.append(rows(level))
            if self.quality is not None:
                quality.append(rows(self.quality(distribution_statistics(level)))[..., 0])
        shapes = tuple((feature.shape[2], feature.shape[3]) for feature in features)
        all_quality = torch.cat(quality, dim=1) if quality else None
        return HeadOutputs(torch.cat(logits, dim=1), torch.cat(bins, dim=1), all_quality, None, shapes)


def quality_predictor() -> nn.Sequential:
    """20 statistics to 64 channels to one logit (GFLV2, section 3.2)."""
    layers = nn.Conv2d(4 * (DGQP_TOP + 1), DGQP_WIDTH, 1), nn.ReLU(), nn.Conv2d(DGQP_WIDTH, 1, 1)
    for layer in (layers[0], layers[2]):
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        nn.init.normal_(layer.weight, std=HEAD_INIT_STD)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def distribution_statistics(bins: Float[Tensor, "B R H W"]) -> Float[Tensor, "B S H W"]:
    """The four largest probabilities of every side and their mean, side by side: 20 maps (GFLV2, Eq. 4).

    The gradient of the class loss reaches the distribution through them.

    Args:
        bins: 4 * 17 logits, side by side.
    """
    probabilities = bins.unflatten(1, (4, REG_MAX + 1)).softmax(dim=2)
    top = probabilities.topk(DGQP_TOP, dim=2).values
    return torch.cat([top, top.mean(dim=2, keepdim=True)], dim=2).flatten(1, 2)


class StarConv(nn.Module):
    """A 3x3 convolution that samples where its offsets say (Deformable ConvNets, Eq. 2), without bias or mask."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.normal_(self.weight, std=HEAD_INIT_STD)

    def forward(self, x: Float[Tensor, "B C H W"], offsets: Float[Tensor, "B 18 H W"]) -> Float[Tensor, "B C H W"]:
        """Maps of the same size. Sampled in float32 under autocast."""
        precise = torch.promote_types(x.dtype, torch.float32)
        return deform_conv2d(x.to(precise), offsets.to(precise), self.weight, padding=1).to(x.dtype)


def star_offsets(distances: Float[Tensor, "B 4 H W"], stride: int) -> Float[Tensor, "B 18 H W"]:
    """Where a kernel's nine taps sample: the centre, the middles of the box's sides and its corners (VFNet, 3.3).

    Args:
        distances: l, t, r, b in pixels; a tenth of the gradient flows back through them.
        stride: of the level.

    Returns:
        (dy, dx) of the taps row by row, in cells, relative to each tap's regular place.
    """
    mixed = STAR_GRADIENT * distances + (1 - STAR_GRADIENT) * distances.detach()
    left, top, right, bottom = (mixed / stride).unbind(1)
    zero = torch.zeros_like(left)
    places = [
        coordinate - regular
        for y, row in zip((-top, zero, bottom), (-1, 0, 1), strict=True)
        for x, column in zip((-left, zero, right), (-1, 0, 1), strict=True)
        for coordinate, regular in ((y, row), (x, column))
    ]
    return torch.stack(places, dim=1)


class VFNetHead(nn.Module):
    """First boxes, then boxes and classes from a star of samples around them (VFNet, sections 3.3 to 3.5).

    Args:
        channels: width of pyramid and towers, a multiple of 32.
        num_classes: C.
        dcn_tower: the last convolution of both towers is modulated deformable.
    """

    def __init__(self, channels: int, num_classes: int, *, dcn_tower: bool = False) -> None:
        super().__init__()
        self.cls_tower = conv_tower(channels, False, dcn_tower, depth=VFNET_DEPTH)
        self.box_tower = conv_tower(channels, False, dcn_tower, depth=VFNET_DEPTH)
        self.box_conv = conv_tower(channels, False, depth=1)
        self.bbox_pred = head_conv(channels, 4)
        self.box_star = StarConv(channels)
        self.refine_pred = head_conv(channels, 4)
        self.cls_star = StarConv(channels)
        self.cls_logits = class_conv(channels, num_classes)
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)
        self.refine_scales = nn.ModuleList(Scale() for _ in STRIDES)

    def forward(self, features: list[Float[Tensor, "B _ _ _"]]) -> HeadOutputs:
        """Predictions of all levels; one feature map per stride."""
        logits, initial, refined = [], [], []
        levels = zip(features, self.scales, self.refine_scales, STRIDES, strict=True)
        for feature, scale, refine_scale, stride in levels:
            box_feature, class_feature = self.box_tower(feature), self.cls_tower(feature)
            first = scale(self.bbox_pred(self.box_conv(box_feature))).float().exp() * (SIDE_SCALE * stride)
            offsets = star_offsets(first, stride)
            factors = refine_scale(self.refine_pred(self.box_star(box_feature, offsets).relu())).float().exp()
            logits.append(rows(self.cls_logits(self.cls_star(class_feature, offsets).relu())))
            initial.append(rows(first))
            refined.append(rows(factors * first.detach()))
        shapes = tuple((feature.shape[2], feature.shape[3]) for feature in features)
        all_rows = (torch.cat(part, dim=1) for part in (logits, initial, refined))
        class_rows, initial_rows, refined_rows = all_rows
        return HeadOutputs(class_rows, initial_rows, None, refined_rows, shapes)

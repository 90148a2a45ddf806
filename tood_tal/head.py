"""T-Head, and the parallel head that the paper compares it with (section 3.1; spec sections 1.2 to 1.6 and 7)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from core.anchors import STRIDES, level_anchors
from core.boxes import boxes_from_distances, decode_deltas
from core.heads import PRIOR_LOGIT, class_conv, rows
from core.layers import HEAD_INIT_STD, NORM_GROUPS, DeformConv, Scale, conv_tower, head_conv

DEPTH = 6  # N, interactive layers (section 3.1)
DEFORMABLE = 2  # of them, the first, where the head is deformable (section 4.2; authors' code)
OFFSET_GROUPS = 4  # of those
ATTENTION_REDUCTION = 8  # channels / this: hidden width of the layer attention (Fig. 3b)
MAP_REDUCTION = 4  # channels / this: hidden width of the maps M and O
SMALL_INIT_STD = 0.001  # of the layer attention and the offsets


class HeadOutputs(NamedTuple):
    """What a head says about every anchor, levels from the finest, inside a level row by row."""

    scores: Float[Tensor, "B A C"]  # probabilities, float32
    boxes: Float[Tensor, "B A 4"]  # xyxy in strides of the anchor's level, float32
    logits: Float[Tensor, "B A C"] | None  # where the scores are their sigmoid: head parallel
    quality: Float[Tensor, "B A"] | None  # centre-ness before the sigmoid
    shapes: tuple[tuple[int, int], ...]  # height, width of each level in cells


class BoxDecoder(nn.Module):
    """Regression maps to boxes in strides, with a learned factor for each level (spec section 1.5).

    Args:
        anchor_based: deltas from anchors; otherwise l, t, r, b distances from their centres.
        anchor_scale: side of the anchors in strides.
    """

    def __init__(self, anchor_based: bool, anchor_scale: float) -> None:
        super().__init__()
        self.anchor_based = anchor_based
        self.anchor_scale = anchor_scale
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)

    def forward(self, regression: Float[Tensor, "B 4 H W"], level: int) -> Float[Tensor, "B 4 H W"]:
        """x1, y1, x2, y2 of every cell, in float32."""
        values, scale = rows(regression.float()), self.scales[level]
        height, width = regression.shape[-2:]
        stride = STRIDES[level]
        anchors, points = level_anchors((height, width), stride, scale=self.anchor_scale, device=regression.device)
        if self.anchor_based:
            boxes = decode_deltas(anchors, scale(values)) / stride
        else:
            boxes = boxes_from_distances(points / stride, scale(values.exp()))
        return boxes.transpose(1, 2).unflatten(2, (height, width))


class TaskDecomposition(nn.Module):
    """Task-specific features from all interactive layers, by layer attention (section 3.1; Fig. 3b; spec section 1.3).

    Scaling the layers' features by their attention equals scaling the reduction's weights, which are far fewer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        stacked = DEPTH * channels
        hidden = channels // ATTENTION_REDUCTION
        self.attention = nn.Sequential(
            pointwise(stacked, hidden, SMALL_INIT_STD),
            nn.ReLU(),
            pointwise(hidden, DEPTH, SMALL_INIT_STD),
            nn.Sigmoid(),
        )
        self.reduction = pointwise(stacked, channels, HEAD_INIT_STD, bias=False)
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)

    def forward(
        self, features: Float[Tensor, "B S H W"], average: Float[Tensor, "B S 1 1"]
    ) -> Float[Tensor, "B C H W"]:
        """Features of one task; `features` are those of all layers side by side, `average` their mean over the map."""
        attention = self.attention(average).flatten(1)
        weights = self.reduction.weight.flatten(1).unflatten(1, (DEPTH, -1))  # (C, N, C)
        kernels = (weights * attention[:, None, :, None]).flatten(2)  # (B, C, S)
        mixed = torch.matmul(rows(features), kernels.transpose(1, 2))
        maps = mixed.transpose(1, 2).unflatten(2, features.shape[-2:])
        return self.norm(maps).relu()


class THead(nn.Module):
    """The task-aligned head, one for all levels (section 3.1).

    Args:
        channels: width of pyramid and head, a multiple of 32.
        num_classes: C.
        anchor_based: see `BoxDecoder`.
        anchor_scale: side of the anchors in strides.
        revert_inside_out: boxes that the sampling turns inside out go back to their un-sampled place.
        dcn: the first two interactive convolutions are modulated deformable.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        anchor_based: bool,
        anchor_scale: float,
        revert_inside_out: bool,
        dcn: bool = False,
    ) -> None:
        super().__init__()
        self.interactive = nn.ModuleList(
            interactive_layer(channels, deformable=dcn and index < DEFORMABLE) for index in range(DEPTH)
        )
        self.cls_decomposition = TaskDecomposition(channels)
        self.box_decomposition = TaskDecomposition(channels)
        self.cls_logits = class_conv(channels, num_classes)
        self.bbox_pred = head_conv(channels, 4)
        self.decoder = BoxDecoder(anchor_based, anchor_scale)
        self.alignment = Alignment(DEPTH * channels, channels // MAP_REDUCTION, revert_inside_out)

    def forward(self, features: list[Float[Tensor, "B _ _ _"]]) -> HeadOutputs:
        """Predictions of all levels; one feature map per stride."""
        scores, boxes = [], []
        for level, feature in enumerate(features):
            layers = []
            for layer in self.interactive:
                feature = layer(feature)
                layers.append(feature)
            stacked = torch.cat(layers, dim=1)
            average = stacked.mean(dim=(2, 3), keepdim=True)
            logits = self.cls_logits(self.cls_decomposition(stacked, average))
            regression = self.bbox_pred(self.box_decomposition(stacked, average))
            aligned, moved = self.alignment(stacked, logits, self.decoder(regression, level))
            scores.append(rows(aligned))
            boxes.append(rows(moved))
        return HeadOutputs(torch.cat(scores, dim=1), torch.cat(boxes, dim=1), None, None, shapes_of(features))


class ParallelHead(nn.Module):
    """Two towers, the head that T-Head replaces; optionally with T-Head's alignment, TAP (spec section 7).

    Args:
        channels: width of pyramid and towers, a multiple of 32.
        num_classes: C.
        anchor_based: see `BoxDecoder`.
        anchor_scale: side of the anchors in strides.
        revert_inside_out: see `THead`; without alignment no box is moved.
        alignment: align scores and boxes, from both towers' last features.
        centerness: predict centre-ness from the box tower, as plain ATSS.
        dcn: the last convolution of both towers is modulated deformable.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        anchor_based: bool,
        anchor_scale: float,
        revert_inside_out: bool,
        alignment: bool,
        centerness: bool,
        dcn: bool = False,
    ) -> None:
        super().__init__()
        self.cls_tower = conv_tower(channels, False, dcn)
        self.box_tower = conv_tower(channels, False, dcn)
        self.cls_logits = class_conv(channels, num_classes)
        self.bbox_pred = head_conv(channels, 4)
        self.quality = head_conv(channels, 1) if centerness else None
        self.decoder = BoxDecoder(anchor_based, anchor_scale)
        self.alignment = Alignment(2 * channels, channels // MAP_REDUCTION, revert_inside_out) if alignment else None

    def forward(self, features: list[Float[Tensor, "B _ _ _"]]) -> HeadOutputs:
        """Predictions of all levels; one feature map per stride."""
        scores, boxes, logits, quality = [], [], [], []
        for level, feature in enumerate(features):
            class_feature, box_feature = self.cls_tower(feature), self.box_tower(feature)
            class_map = self.cls_logits(class_feature)
            box_map = self.decoder(self.bbox_pred(box_feature), level)
            if self.alignment is None:
                logits.append(rows(class_map.float()))
                scores.append(logits[-1].sigmoid())
            else:
                both = torch.cat([class_feature, box_feature], dim=1)
                class_map, box_map = self.alignment(both, class_map, box_map)
                scores.append(rows(class_map))
            boxes.append(rows(box_map))
            if self.quality is not None:
                quality.append(rows(self.quality(box_feature))[..., 0])
        return HeadOutputs(
            torch.cat(scores, dim=1),
            torch.cat(boxes, dim=1),
            torch.cat(logits, dim=1) if logits else None,
            torch.cat(quality, dim=1) if quality else None,
            shapes_of(features),
        )


class Alignment(nn.Module):
    """Scores and boxes made to agree, by a probability map M and offset maps O (section 3.1; spec sections 1.4, 1.5).

    Args:
        in_channels: of the features that both maps are predicted from.
        hidden: width between the two convolutions of each.
        revert_inside_out: see `THead`.
    """

    def __init__(self, in_channels: int, hidden: int, revert_inside_out: bool) -> None:
        super().__init__()
        self.revert_inside_out = revert_inside_out
        self.probability = map_predictor(in_channels, hidden, 1, HEAD_INIT_STD, PRIOR_LOGIT)
        self.offset = map_predictor(in_channels, hidden, 8, SMALL_INIT_STD, 0.0)

    def forward(
        self, features: Float[Tensor, "B F H W"], logits: Float[Tensor, "B C H W"], boxes: Float[Tensor, "B 4 H W"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B 4 H W"]]:
        """Aligned scores in [0, 1] and boxes in strides, both in float32."""
        scores = aligned_scores(logits, self.probability(features))
        moved = sample_boundaries(boxes, self.offset(features).float())
        return scores, revert_inside_out(moved, boxes) if self.revert_inside_out else moved


def aligned_scores(logits: Float[Tensor, "B C H W"], alignment: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B C H W"]:
    """sqrt(sigmoid(logits) * sigmoid(alignment)) in float32 or better (section 3.1; spec section 1.4).

    By logarithms the gradient is score * (1 - sigmoid) / 2, finite where the score underflows to 0; that of the square
    root would be infinite there.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_sigmoid = torch.nn.functional.logsigmoid
    return ((log_sigmoid(logits.to(precise)) + log_sigmoid(alignment.to(precise))) / 2).exp()


def sample_boundaries(boxes: Float[Tensor, "B 4 H W"], offsets: Float[Tensor, "B 8 H W"]) -> Float[Tensor, "B 4 H W"]:
    """Each side of a box from where its own offset points, bilinear (section 3.1; spec section 1.5).

    Plain indexing, which is exact at offset 0 and can be exported; cells outside the map count as 0.

    Args:
        boxes: x1, y1, x2, y2 in strides.
        offsets: (dy, dx) of x1, of y1, of x2, of y2, in cells of the level, of any size.
    """
    height, width = boxes.shape[-2:]
    steps = offsets.unflatten(1, (4, 2))
    y = steps[:, :, 0] + torch.arange(height, device=boxes.device)[:, None]
    x = steps[:, :, 1] + torch.arange(width, device=boxes.device)
    flat = boxes.flatten(2)
    sampled = torch.zeros_like(boxes)
    for row, row_weight in neighbours(y):
        for column, column_weight in neighbours(x):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            # bounded before it becomes a whole number: that of a huge or missing offset is undefined
            index = row.clamp(0, height - 1).nan_to_num() * width + column.clamp(0, width - 1).nan_to_num()
            values = flat.gather(2, index.long().flatten(2)).view_as(boxes)
            sampled = sampled + torch.where(inside, row_weight * column_weight * values, 0.0)
    return sampled


def neighbours(
    place: Float[Tensor, "*n"],
) -> tuple[tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]], tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]]:
    """The whole numbers below and above a place, and how much of each it takes."""
    low = place.detach().floor()
    return (low, 1 - (place - low)), (low + 1, place - low)


def revert_inside_out(moved: Float[Tensor, "B 4 H W"], boxes: Float[Tensor, "B 4 H W"]) -> Float[Tensor, "B 4 H W"]:
    """The moved boxes; the un-moved one, all four sides, where x1 > x2 or y1 > y2 (spec section 1.5)."""
    inside_out = (moved[:, :2] > moved[:, 2:]).any(dim=1, keepdim=True)
    return torch.where(inside_out, boxes, moved)


def shapes_of(features: list[Float[Tensor, "B _ _ _"]]) -> tuple[tuple[int, int], ...]:
    """Height and width of each level in cells."""
    return tuple((feature.shape[2], feature.shape[3]) for feature in features)


def pointwise(in_channels: int, out_channels: int, std: float, bias: bool = True) -> nn.Conv2d:
    """A 1x1 convolution with weight N(0, std) and bias 0."""
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
    nn.init.normal_(conv.weight, std=std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def map_predictor(in_channels: int, hidden: int, out_channels: int, std: float, bias: float) -> nn.Sequential:
    """1x1 convolution, ReLU, 3x3 convolution that starts at `bias` (spec sections 1.2, 1.6)."""
    last = nn.Conv2d(hidden, out_channels, 3, padding=1)
    assert last.bias is not None
    nn.init.normal_(last.weight, std=std)
    nn.init.constant_(last.bias, bias)
    return nn.Sequential(pointwise(in_channels, hidden, std), nn.ReLU(), last)


def interactive_layer(channels: int, deformable: bool) -> nn.Sequential:
    """3x3 convolution without bias, GroupNorm, ReLU (section 3.1 and the authors' norm)."""
    if not deformable:
        return conv_tower(channels, False, depth=1)
    conv = DeformConv(channels, channels, offset_groups=OFFSET_GROUPS)
    nn.init.normal_(conv.weight, std=HEAD_INIT_STD)
    return nn.Sequential(conv, nn.GroupNorm(NORM_GROUPS, channels), nn.ReLU(inplace=True))

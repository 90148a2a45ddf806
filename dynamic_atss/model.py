"""The network of every host: backbone, pyramid and head in one forward, and the boxes that its outputs mean."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from core.anchors import AnchorGrid, anchor_grid, anchor_strides
from core.backbone import build_backbone
from core.boxes import boxes_from_distances, decode_deltas
from core.fpn import FPN
from core.geometry import Geometry
from core.heads import ParallelHead
from core.pixels import normalize_pixels
from dynamic_atss.config import Config
from dynamic_atss.head import REG_MAX, GFLHead, VFNetHead


class Outputs(NamedTuple):
    """What the head says about every anchor of every level."""

    logits: Float[Tensor, "B A C"]  # class scores before the sigmoid
    regression: Float[Tensor, "B A R"]  # ATSS: deltas; GFL, GFLV2: 4 * 17 bin logits; VFNet: first l, t, r, b, pixels
    quality: Float[Tensor, "B A"] | None  # ATSS: centre-ness or IoU; GFLV2: predicted quality; before the sigmoid
    refined: Float[Tensor, "B A 4"] | None  # VFNet: refined l, t, r, b in pixels
    grid: AnchorGrid


class DynamicATSS(nn.Module):
    """ATSS, GFL, GFLV2 or VFNet. Combined IoUs change the training alone, so inference costs what the host's does."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        self.geometry = config.box_geometry
        self.anchor_scale = config.anchor_scale
        self.caffe2_pixels = config.switches.caffe2_backbone
        self.backbone = build_backbone(config)
        self.fpn = FPN(self.backbone.out_channels, config.channels, relu_before_p7=config.switches.relu_before_p7)
        self.head = build_head(config, num_classes)

    def forward(self, images: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Outputs:
        """Predictions for a batch of RGB bytes; `sizes` holds each image's height and width inside the canvas."""
        pixels = normalize_pixels(images, sizes, self.caffe2_pixels)
        return self.detect(self.fpn(self.backbone(pixels)))

    def detect(self, pyramid: list[Float[Tensor, "B _ _ _"]]) -> Outputs:
        """The head's predictions for the maps of a pyramid."""
        return run_head(self.head, pyramid, self.geometry, self.anchor_scale)


def float32_outputs(outputs: Outputs) -> Outputs:
    """The outputs in float32 or better: half precision would move assignments and lose small losses."""

    def precise(part: Tensor) -> Tensor:
        return part.to(torch.promote_types(part.dtype, torch.float32))

    return Outputs(
        precise(outputs.logits),
        precise(outputs.regression),
        None if outputs.quality is None else precise(outputs.quality),
        None if outputs.refined is None else precise(outputs.refined),
        outputs.grid,
    )


def build_head(config: Config, num_classes: int) -> nn.Module:
    """The head of the host."""
    if config.host == "atss":
        bias = config.switches.tower_bias
        return ParallelHead(config.channels, num_classes, tower_bias=bias, dcn_tower=config.dcn_tower)
    if config.host == "vfnet":
        return VFNetHead(config.channels, num_classes, dcn_tower=config.dcn_tower)
    return GFLHead(config.channels, num_classes, quality=config.host == "gflv2", dcn_tower=config.dcn_tower)


def run_head(head: nn.Module, pyramid: list[Float[Tensor, "B _ _ _"]], geometry: Geometry, scale: float) -> Outputs:
    """Any host's head on a pyramid, with the anchors of its maps."""
    found = head(pyramid)
    grid = anchor_grid(found.shapes, geometry, scale=scale, device=pyramid[0].device)
    if isinstance(head, ParallelHead):
        return Outputs(found.logits, found.deltas, found.quality, None, grid)
    return Outputs(found.logits, found.regression, found.quality, found.refined, grid)


def decode(
    regression: Float[Tensor, "B n R"],
    anchors: Float[Tensor, "*#B n 4"],
    points: Float[Tensor, "*#B n 2"],
    strides: Float[Tensor, "*#B n"],
    config: Config,
) -> Float[Tensor, "B n 4"]:
    """Boxes in pixels from one kind of regression of a host, unclipped.

    Args:
        regression: deltas, bin logits or distances.
        anchors: of each row.
        points: their centres.
        strides: of their levels.
        config: names the host.
    """
    if config.host == "atss":
        return decode_deltas(anchors, regression, config.box_geometry, config.switches.clamp_both_sides)
    if config.host == "vfnet":
        return boxes_from_distances(points, regression)
    return boxes_from_distances(points, expected_distances(regression) * strides[..., None])


def expected_distances(bins: Float[Tensor, "*n R"]) -> Float[Tensor, "*n 4"]:
    """Mean of each side's distribution over 0 ... 16, in strides: l, t, r, b (GFL, Eq. 5)."""
    probabilities = bins.unflatten(-1, (4, REG_MAX + 1)).softmax(dim=-1)
    return (probabilities * torch.arange(REG_MAX + 1, device=bins.device)).sum(dim=-1)


def final_regression(outputs: Outputs) -> Float[Tensor, "B A R"]:
    """The regression that a detection's box comes from: VFNet's is the refined one."""
    return outputs.regression if outputs.refined is None else outputs.refined


def predicted_boxes(outputs: Outputs, config: Config) -> Float[Tensor, "B A 4"]:
    """The boxes whose IoU is the predicted one in the Combined IoU: of all anchors, in pixels, unclipped."""
    initial = config.host == "vfnet" and config.pred_source == "initial"
    regression = outputs.regression if initial else final_regression(outputs)
    grid = outputs.grid
    return decode(regression, grid.boxes, grid.points, anchor_strides(grid), config)

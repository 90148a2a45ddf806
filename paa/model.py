"""PAA's network: backbone, pyramid and head in one forward."""

from typing import NamedTuple

from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from core.anchors import AnchorGrid, anchor_grid
from core.backbone import build_backbone
from core.fpn import FPN
from core.heads import ParallelHead
from core.pixels import normalize_pixels
from paa.config import Config


class Outputs(NamedTuple):
    """What the head says about every anchor of every level."""

    logits: Float[Tensor, "B A C"]  # class scores before the sigmoid
    deltas: Float[Tensor, "B A 4"]  # box regression relative to the anchor
    quality_logits: Float[Tensor, "B A"] | None  # IoU of the regressed box with its object, before the sigmoid
    grid: AnchorGrid


class PAA(nn.Module):
    """RetinaNet's layout with one anchor a location and an IoU branch (section 3.2), or ATSS's centre-ness, or none."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        self.geometry = config.box_geometry
        self.anchor_scale = config.anchor_scale
        self.caffe2_pixels = config.switches.caffe2_backbone
        self.backbone = build_backbone(config)
        self.fpn = FPN(self.backbone.out_channels, config.channels, relu_before_p7=config.switches.relu_before_p7)
        self.head = ParallelHead(
            config.channels,
            num_classes,
            tower_bias=config.switches.tower_bias,
            dcn_tower=config.dcn_tower,
            quality=config.quality != "none",
        )

    def forward(self, images: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Outputs:
        """Predictions for a batch of RGB bytes; `sizes` holds each image's height and width inside the canvas."""
        pixels = normalize_pixels(images, sizes, self.caffe2_pixels)
        head = self.head(self.fpn(self.backbone(pixels)))
        grid = anchor_grid(head.shapes, self.geometry, scale=self.anchor_scale, device=images.device)
        return Outputs(head.logits, head.deltas, head.quality, grid)

"""TOOD's network: backbone, pyramid and head in one forward."""

from typing import NamedTuple

from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from core.anchors import AnchorGrid, anchor_grid
from core.backbone import build_backbone
from core.fpn import FPN
from core.pixels import normalize_pixels
from tood_tal.config import Config
from tood_tal.head import ParallelHead, THead


class Outputs(NamedTuple):
    """What the head says about every anchor of every level; scores and boxes in float32."""

    scores: Float[Tensor, "B A C"]  # probabilities
    boxes: Float[Tensor, "B A 4"]  # xyxy in strides of the anchor's level, unclipped
    logits: Float[Tensor, "B A C"] | None  # where the scores are their sigmoid: head parallel
    quality: Float[Tensor, "B A"] | None  # centre-ness before the sigmoid
    grid: AnchorGrid


class TOOD(nn.Module):
    """A one-stage detector with T-Head, or with the parallel head (Fig. 2)."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        self.anchor_scale = config.anchor_scale
        self.backbone = build_backbone(config)
        self.fpn = FPN(self.backbone.out_channels, config.channels, xavier=True)
        self.head = build_head(config, num_classes)

    def forward(self, images: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Outputs:
        """Predictions for a batch of RGB bytes; `sizes` holds each image's height and width inside the canvas."""
        return self.detect(self.fpn(self.backbone(normalize_pixels(images, sizes, caffe2=False))))

    def detect(self, pyramid: list[Float[Tensor, "B _ _ _"]]) -> Outputs:
        """The head's predictions for the maps of a pyramid."""
        return run_head(self.head, pyramid, self.anchor_scale)


def build_head(config: Config, num_classes: int) -> THead | ParallelHead:
    """The head that the configuration names."""
    revert = config.rules.revert_inside_out
    if config.head == "t_head":
        return THead(
            config.channels,
            num_classes,
            anchor_based=config.anchor_based,
            anchor_scale=config.anchor_scale,
            revert_inside_out=revert,
            dcn=config.dcn_tower,
        )
    return ParallelHead(
        config.channels,
        num_classes,
        anchor_based=config.anchor_based,
        anchor_scale=config.anchor_scale,
        revert_inside_out=revert,
        alignment=config.head == "parallel_tap",
        centerness=config.quality == "centerness",
        dcn=config.dcn_tower,
    )


def run_head(head: nn.Module, pyramid: list[Float[Tensor, "B _ _ _"]], anchor_scale: float) -> Outputs:
    """A head on a pyramid, with the anchors of its maps."""
    found = head(pyramid)
    grid = anchor_grid(found.shapes, scale=anchor_scale, device=pyramid[0].device)
    return Outputs(found.scores, found.boxes, found.logits, found.quality, grid)

"""A backbone, pyramid and head put together as the methods do, for tests of the parts that are in core."""

import torch
from torch import Tensor, nn

from core.backbone import build_backbone
from core.config import PyramidConfig
from core.fpn import FPN
from core.heads import HeadOutputs, ParallelHead
from core.pixels import normalize_pixels


class Detector(nn.Module):
    """ATSS and PAA without their losses."""

    def __init__(self, config: PyramidConfig, num_classes: int = 80) -> None:
        super().__init__()
        self.caffe2 = config.switches.caffe2_backbone
        self.backbone = build_backbone(config)
        self.fpn = FPN(self.backbone.out_channels, config.channels, config.switches.relu_before_p7)
        self.head = ParallelHead(
            config.channels, num_classes, tower_bias=config.switches.tower_bias, dcn_tower=config.dcn_tower
        )

    def forward(self, images: Tensor, sizes: Tensor) -> HeadOutputs:
        """Predictions for a batch of RGB bytes."""
        return self.head(self.fpn(self.backbone(normalize_pixels(images, sizes, self.caffe2))))


def meta_detector(config: PyramidConfig) -> Detector:
    """A detector without memory: enough to count."""
    with torch.device("meta"):
        return Detector(config)


def count(module: nn.Module, trainable: bool = False) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)

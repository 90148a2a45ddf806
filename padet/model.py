"""PADet: encoder, decoder, and on every level the anchor promotion module and the detection head (spec section 1)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from core.backbone import build_resnet
from core.errors import UserError
from core.heads import rows
from core.layers import head_conv
from core.pixels import normalize_pixels
from padet.anchors import Anchors, anchors_per_cell, build_anchors
from padet.coder import decode
from padet.config import Config, level_sides
from padet.layers import FeatureAlignment, Norm, conv_block
from padet.vgg import ReducedVGG16

CAFFE_MEAN = (104.0, 117.0, 123.0)  # BGR, of bytes: what SSD's VGG-16 weights expect
EXTRAS = ((256, 512), (128, 256))  # channels of the 1x1 and the 3x3 of an extra block; the last pair goes on (SSD)
UNALIGNED_LEVELS = 2  # the coarsest ones, which have no FAM


class Outputs(NamedTuple):
    """What both stages say about every anchor of every level."""

    apm_logits: Float[Tensor, "B A"] | None  # APM: is this anchor positive, before the sigmoid
    apm_deltas: Float[Tensor, "B A 4"] | None  # APM: from the initial to the promoted anchor
    logits: Float[Tensor, "B A K"]  # detection, K = C + 1 classes before the softmax; 0 is background
    deltas: Float[Tensor, "B A 4"]  # detection: from the promoted anchor (the initial one without) to the box
    offsets: tuple[Float[Tensor, "B 18 _ _"], ...]  # FAM, of each aligned level, in cells: (dy, dx) of nine places
    anchors: Anchors


class PADet(nn.Module):
    """The whole network. Nothing is shared between levels (SSD's practice; spec section 1.5)."""

    anchor_boxes: Tensor

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        self.size, self.pixels = config.size, config.pixels
        self.learns_norm = config.block_norm == "batch"
        anchors = build_anchors(config.size, config.anchors)
        self.sides, self.per_cell = anchors.sides, anchors.per_cell
        self.register_buffer("anchor_boxes", anchors.boxes, persistent=False)
        self.backbone = ReducedVGG16() if config.backbone == "vgg16" else build_resnet(config)
        taps = list(self.backbone.out_channels)
        self.extras = nn.ModuleList()
        while len(taps) < len(self.sides) - 1:
            squeeze, widen = EXTRAS[min(len(self.extras), len(EXTRAS) - 1)]
            first = conv_block(taps[-1], squeeze, 1, config.block_norm)
            self.extras.append(nn.Sequential(first, conv_block(squeeze, widen, 3, config.block_norm, stride=2)))
            taps.append(widen)
        self.decoder = Decoder(taps, config.channels, config.block_norm)
        self.heads = nn.ModuleList(level_heads(config, num_classes))

    def forward(self, images: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Outputs:
        """Predictions for a batch of square RGB images of bytes; `sizes` says the same of each image.

        Raises:
            UserError: training with one image and batch norm, which has one value a channel on the last level.
            ValueError: for images of another size.
        """
        if images.shape[2:] != (self.size, self.size):
            raise ValueError(f"expected images of {self.size} x {self.size}, got {tuple(images.shape[2:])}")
        if self.training and self.learns_norm and len(images) < 2:
            raise UserError(
                "batch norm needs two images on every device: raise --batch-size, or use --block-norm frozen"
            )
        return self.detect(self.pyramid(normalize(images, sizes, self.pixels)))

    def pyramid(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B C _ _"]]:
        """P_1 ... of normalised images: encoder with extra blocks, then the decoder."""
        maps = self.backbone(pixels)
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return self.decoder(maps)

    def detect(self, pyramid: list[Float[Tensor, "B C _ _"]]) -> Outputs:
        """Both stages on the maps of all levels."""
        levels = [head(level) for head, level in zip(self.heads, pyramid, strict=True)]
        scores, boxes, logits, deltas, offsets = zip(*levels, strict=True)
        return Outputs(
            _join(scores, 1)[..., 0] if scores[0] is not None else None,
            _join(boxes, 4) if boxes[0] is not None else None,
            torch.cat([rows(level).unflatten(2, (n, -1)).flatten(1, 2) for level, n in self._counted(logits)], dim=1),
            _join(deltas, 4),
            tuple(level for level in offsets if level is not None),
            Anchors(self.anchor_boxes, self.sides, self.per_cell),
        )

    def _counted(self, maps: tuple[Tensor, ...]) -> list[tuple[Tensor, int]]:
        return list(zip(maps, self.per_cell, strict=True))


def _join(maps: tuple[Float[Tensor, "B _ _ _"], ...], width: int) -> Float[Tensor, "B A {width}"]:
    """Maps of all levels (B, A_l * width, H, W) as one row for each anchor: level by level, cell by cell, by shape."""
    return torch.cat([rows(level).unflatten(2, (-1, width)).flatten(1, 2) for level in maps], dim=1)


def normalize(images: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"], pixels: str) -> Float[Tensor, "B 3 H W"]:
    """Bytes as the backbone's weights expect them: ImageNet's means and deviations, or BGR minus SSD's means."""
    if pixels == "imagenet":
        return normalize_pixels(images, sizes, caffe2=False)
    return torch.stack([images[:, 2 - c].float() - CAFFE_MEAN[c] for c in range(3)], dim=1)


class Decoder(nn.Module):
    """Top-down path with additive skips (paper, section 3; spec section 1.4).

    D_i = S_i(E_i) + CBR1(upsampled D_(i+1)); one more level pools the last; P_i = CBR3(D_i) reads each, and the next
    finer level gets D itself.
    """

    def __init__(self, in_channels: list[int], channels: int, norm: Norm) -> None:
        super().__init__()
        self.skips = nn.ModuleList(conv_block(width, channels, 1, norm) for width in in_channels)
        self.ups = nn.ModuleList(conv_block(channels, channels, 1, norm) for _ in in_channels[1:])
        self.enhance = nn.ModuleList(conv_block(channels, channels, 3, norm) for _ in range(len(in_channels) + 1))

    def forward(self, maps: list[Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B C _ _"]]:
        """P_1 ... P_(T+1) of the encoder's E_1 ... E_T."""
        decoded = [self.skips[-1](maps[-1])]
        for level in reversed(range(len(self.ups))):
            size = maps[level].shape[2:]
            raised = F.interpolate(decoded[0], size=size, mode="bilinear", align_corners=False)
            decoded.insert(0, self.skips[level](maps[level]) + self.ups[level](raised))
        decoded.append(F.max_pool2d(decoded[-1], 2))
        return [block(level) for block, level in zip(self.enhance, decoded, strict=True)]


class LevelHead(nn.Module):
    """APM and the detection head of one level (spec section 1.5).

    Channels are grouped by anchor: a * k + j of the k numbers of anchor a.
    """

    def __init__(self, config: Config, num_classes: int, anchors: int, aligned: bool) -> None:
        super().__init__()
        channels, norm = config.channels, config.block_norm
        self.apm_score = head_conv(channels, anchors) if config.apm_score else None
        self.apm_box = head_conv(channels, 4 * anchors) if config.apm_box else None
        self.stem = conv_block(channels, channels, 3, norm)
        self.fam = None
        if aligned and config.fam != "none":
            self.fam = FeatureAlignment(config.fam, channels, anchors, norm, config.fam_detach)
        self.classes = head_conv(channels, anchors * (num_classes + 1))
        self.boxes = head_conv(channels, 4 * anchors)
        if config.prior:
            self._start_at_prior(config.prior, num_classes)

    def forward(
        self, level: Float[Tensor, "B C H W"]
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:
        """Maps of APM scores and deltas, class logits, deltas, and FAM's offsets; None for what this level lacks."""
        score = self.apm_score(level) if self.apm_score is not None else None
        promotion = self.apm_box(level) if self.apm_box is not None else None
        features, offsets = self.stem(level), None
        if self.fam is not None:
            features, offsets = self.fam(features, promotion)
        return score, promotion, self.classes(features), self.boxes(features), offsets

    def _start_at_prior(self, prior: float, num_classes: int) -> None:
        """Every anchor starts with this APM score and this probability of all classes together.

        Deviation: the paper starts biases at 0; its losses then begin 30 to 300 times larger (spec section 7, item 9).
        """
        if self.apm_score is not None:
            assert self.apm_score.bias is not None
            nn.init.constant_(self.apm_score.bias, -math.log((1 - prior) / prior))
        assert self.classes.bias is not None
        with torch.no_grad():
            self.classes.bias.view(-1, num_classes + 1)[:, 0] = math.log(num_classes * (1 - prior) / prior)


def level_heads(config: Config, num_classes: int) -> list[LevelHead]:
    """A head for every level; the coarsest ones are not aligned."""
    counts = anchors_per_cell(config.size)
    aligned = len(level_sides(config.size)) - UNALIGNED_LEVELS
    return [LevelHead(config, num_classes, count, level < aligned) for level, count in enumerate(counts)]


def float32_outputs(outputs: Outputs) -> Outputs:
    """The outputs in float32 or better: half precision would move matches and overflow in the coder."""

    def precise(part: Tensor) -> Tensor:
        return part.to(torch.promote_types(part.dtype, torch.float32))

    return Outputs(
        None if outputs.apm_logits is None else precise(outputs.apm_logits),
        None if outputs.apm_deltas is None else precise(outputs.apm_deltas),
        precise(outputs.logits),
        precise(outputs.deltas),
        tuple(precise(level) for level in outputs.offsets),
        outputs.anchors,
    )


def promoted_anchors(outputs: Outputs) -> Float[Tensor, "B A 4"]:
    """The references of the second stage, in pixels: promoted anchors, or the initial ones where APM moves none.

    They pass no gradient (spec section 3.1) and are not clipped to the image.
    """
    if outputs.apm_deltas is None:
        return outputs.anchors.boxes.expand(len(outputs.deltas), -1, -1)
    return decode(outputs.anchors.boxes, outputs.apm_deltas.detach())

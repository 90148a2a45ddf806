"""The blocks that PADet is made of: convolution with batch norm, and the feature alignment module (FAM)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from core.layers import FrozenBatchNorm
from padet.config import Fam

Norm = Literal["batch", "frozen"]
TAPS = 9  # K, places that a 3x3 convolution reads


def conv_block(in_channels: int, out_channels: int, kernel: int, norm: Norm, stride: int = 1) -> nn.Sequential:
    """The paper's CBR: convolution without bias, batch norm, ReLU. He initialisation (section 4)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, norm_layer(out_channels, norm), nn.ReLU(inplace=True))


def norm_layer(channels: int, norm: Norm) -> nn.Module:
    """Batch norm, learned or by stored statistics."""
    return nn.BatchNorm2d(channels) if norm == "batch" else FrozenBatchNorm(channels)


class FeatureAlignment(nn.Module):
    """FAM: a deformable 3x3 convolution whose offsets follow the promotion of anchors (paper and spec, section 3.2).

    y(p) = sum_k w_k * x(p + p_k + offset_k), then batch norm and ReLU. Offsets are in cells, (dy, dx) for each of the
    nine places row by row. They come from 3x3 convolutions that start at 0, so at first this is a plain convolution.

    Note: deformable convolution of the first version, without masks: the paper counts 2K + 2 outputs.
    """

    def __init__(self, source: Fam, channels: int, anchors: int, norm: Norm, detach: bool = False) -> None:
        """A module for one level.

        Args:
            source: what offsets come from, see `offsets`; not `none`.
            channels: of the maps.
            anchors: A, of a cell.
            norm: of the result.
            detach: offsets give the deltas no gradient.
        """
        super().__init__()
        self.source, self.detach = source, detach
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm = norm_layer(channels, norm)
        inputs = {"implicit": channels, "explicit_ls": 4 * anchors}.get(source, 2 * anchors)
        self.offset = _zero_conv(inputs, 2 * TAPS)
        self.shift = _zero_conv(2 * anchors, 2) if source == "disentangled" else None

    def forward(
        self, x: Float[Tensor, "B C H W"], deltas: Float[Tensor, "B D H W"] | None
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B 18 H W"]]:
        """Aligned features and the offsets, of APM's deltas (B, 4A, H, W). Sampled in float32 under autocast."""
        offsets = self.offsets(x, deltas)
        precise = torch.promote_types(x.dtype, torch.float32)  # torchvision has no bfloat16 kernel on CPU
        y = deform_conv2d(x.to(precise), offsets.to(precise), self.conv.weight, padding=1)
        return self.norm(y.to(x.dtype)).relu(), offsets

    def offsets(
        self, x: Float[Tensor, "B C H W"], deltas: Float[Tensor, "B D H W"] | None
    ) -> Float[Tensor, "B 18 H W"]:
        """Offsets of the nine places (Fig. 5, Table 1): F of the features, or of the deltas' location and shape parts.

        `implicit`: F(X). `explicit_l`, `explicit_s`, `explicit_ls`: F(X_l), F(X_s), F(X_l; X_s). `disentangled`:
        F(X_s) plus one shift for all places, G(X_l).
        """
        if self.source == "implicit":
            return self.offset(x)
        assert deltas is not None
        locations, shapes = split_deltas(deltas.detach() if self.detach else deltas)
        if self.shift is not None:
            return self.offset(shapes) + self.shift(locations).repeat(1, TAPS, 1, 1)
        chosen = {"explicit_l": (locations,), "explicit_s": (shapes,)}.get(self.source, (locations, shapes))
        return self.offset(torch.cat(chosen, dim=1))


def split_deltas(deltas: Float[Tensor, "B D H W"]) -> tuple[Float[Tensor, "B E H W"], Float[Tensor, "B E H W"]]:
    """X_l and X_s: dx and dy, dw and dh of all anchors of a cell, two channels each in the order of the anchors."""
    parts = deltas.unflatten(1, (-1, 4))
    return parts[:, :, :2].flatten(1, 2), parts[:, :, 2:].flatten(1, 2)


def _zero_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that starts at 0, as in Deformable ConvNets."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv

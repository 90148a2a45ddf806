"""The blocks that PADet is made of: convolution with batch norm, and the feature alignment module (FAM)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from core.heads import rows
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
        maps, moves = x.to(precise), offsets.to(precise)
        if x.is_cpu and not torch.is_grad_enabled():
            y = sampled_conv(maps, moves, self.conv.weight)
        else:
            y = deform_conv2d(maps, moves, self.conv.weight, padding=1)
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


def sampled_conv(
    x: Float[Tensor, "B C H W"], offsets: Float[Tensor, "B 18 H W"], weight: Float[Tensor, "D C 3 3"]
) -> Float[Tensor, "B D H W"]:
    """What `deform_conv2d` with padding 1 gives, without its gradients, for a CPU.

    torchvision's kernel there samples one channel at a time, on one thread. Here a sample is the weighted sum of four
    cells with all their channels, which one row of memory holds, and a matrix product does the rest.
    """
    batch, channels, height, width = x.shape
    cells, shares = sampling_places(offsets)
    bags = F.embedding_bag(cells, rows(x).flatten(0, 1), per_sample_weights=shares, mode="sum")
    samples = bags.view(batch * height * width, TAPS * channels)
    with torch.autocast(x.device.type, enabled=False):
        y = samples @ weight.permute(0, 2, 3, 1).flatten(1).T
    return y.view(batch, height, width, len(weight)).permute(0, 3, 1, 2)


def sampling_places(offsets: Float[Tensor, "B 18 H W"]) -> tuple[Int[Tensor, "n 4"], Float[Tensor, "n 4"]]:
    """The four cells around each place that is sampled, and their shares: bilinear, cells outside the map count 0.

    Args:
        offsets: (dy, dx) of nine places, in cells.

    Returns:
        For n = B * H * W * 9 places numbers of cells, counted over the images of the batch, row by row.
    """
    batch, _, height, width = offsets.shape
    device = offsets.device
    taps = torch.arange(TAPS, device=device)
    moves = offsets.permute(0, 2, 3, 1).unflatten(3, (TAPS, 2))
    y = moves[..., 0] + (torch.arange(height, device=device)[:, None, None] + taps // 3 - 1)
    x = moves[..., 1] + (torch.arange(width, device=device)[:, None] + taps % 3 - 1)
    row, row_share = _neighbours(y, height)
    column, column_share = _neighbours(x, width)
    first = torch.arange(batch, device=device)[:, None, None, None, None] * height
    cells = ((first + row) * width)[..., :, None] + column[..., None, :]
    return cells.view(-1, 4), (row_share[..., :, None] * column_share[..., None, :]).view(-1, 4)


def _neighbours(places: Float[Tensor, "*n"], size: int) -> tuple[Int[Tensor, "*n 2"], Float[Tensor, "*n 2"]]:
    """Whole numbers below and above each place on an axis, kept inside it, and their shares; those outside get 0."""
    places = places.clamp(-1, size)
    low = places.floor()
    share = places - low
    both = torch.stack([low, low + 1], dim=-1)
    shares = torch.stack([1 - share, share], dim=-1).masked_fill((both < 0) | (both >= size), 0.0)
    return both.clamp(0, size - 1).nan_to_num(0.0).long(), shares  # the share of a NaN place is NaN


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

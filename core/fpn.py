"""The feature pyramid P3 to P7 of one-stage detectors (FPN; RetinaNet, section 4)."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, xavier: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1: bias 0, Kaiming-uniform weight with a = 1 (spec PAA section 1)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)
    if xavier:
        nn.init.xavier_uniform_(conv.weight)
    else:
        nn.init.kaiming_uniform_(conv.weight, a=1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class FPN(nn.Module):
    """C3, C4, C5 to P3 ... P7 of equal width, strides 8, 16, 32, 64, 128.

    Args:
        in_channels: of C3, C4 and C5.
        channels: of every output.
        relu_before_p7: P7 reads ReLU(P6), as the authors of PAA and ATSS do; MMDetection has none.
        p6_from: P6 reads the output P5 or, as RetinaNet, C5.
        xavier: weights start Xavier-uniform (spec TOOD section 1.1) and not Kaiming-uniform with a = 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        relu_before_p7: bool = False,
        p6_from: Literal["p5", "c5"] = "p5",
        xavier: bool = False,
    ) -> None:
        super().__init__()
        self.relu_before_p7 = relu_before_p7
        self.p6_from = p6_from
        self.lateral = nn.ModuleList(_conv(width, channels, kernel=1, xavier=xavier) for width in in_channels)
        p6_channels = channels if p6_from == "p5" else in_channels[-1]
        self.output = nn.ModuleList(
            [_conv(channels, channels, kernel=3, xavier=xavier) for _ in in_channels]
            + [_conv(width, channels, kernel=3, stride=2, xavier=xavier) for width in (p6_channels, channels)]
        )

    def forward(self, features: list[Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B C _ _"]]:
        """P3 to P7; each side is half the finer level's, rounded up, whatever the input's size."""
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for level in range(len(merged) - 1, 0, -1):
            finer = merged[level - 1]
            merged[level - 1] = finer + F.interpolate(merged[level], size=finer.shape[-2:], mode="nearest")
        *outputs, p6_conv, p7_conv = self.output
        pyramid = [output(feature) for output, feature in zip(outputs, merged, strict=True)]
        p6 = p6_conv(pyramid[-1] if self.p6_from == "p5" else features[-1])
        p7 = p7_conv(F.relu(p6) if self.relu_before_p7 else p6)
        return [*pyramid, p6, p7]

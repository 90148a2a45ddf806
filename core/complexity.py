"""How large a model is and how much it computes, without weights or data: what `--dry-run` tells."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core.anchors import SIZE_DIVISOR
from core.config import TrainConfig
from core.data.transforms import network_sizes

CLASSES = 80  # COCO's
IMAGE = (1000, 1600)  # height, width before resizing: 800 x 1280 at the papers' scale, as MMDetection counts


class Complexity(NamedTuple):
    """Size of a model and cost of one forward."""

    parameters: int
    trainable: int
    multiply_adds: int  # of convolutions and matrix products; what papers call FLOPs
    canvas: tuple[int, int]  # height, width in pixels


def measure(model: nn.Module, canvas: tuple[int, int]) -> Complexity:
    """Parameters, and multiply-adds of one image of `canvas`; works on the meta device, where nothing is computed.

    Args:
        model: called as model(images, sizes).
        canvas: height and width, multiples of 32.
    """
    device = next(model.parameters()).device
    images = torch.zeros(1, 3, *canvas, dtype=torch.uint8, device=device)
    sizes = torch.tensor([canvas]).to(device)
    operators: dict[Any, Callable[..., int]] = {torch.ops.torchvision.deform_conv2d: _deform_conv_flops}
    with FlopCounterMode(display=False, custom_mapping=operators) as counter, torch.no_grad():
        model(images, sizes)
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    return Complexity(total, trainable, counter.get_total_flops() // 2, canvas)


def _deform_conv_flops(inputs: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two operations for each weight and output cell; interpolating the samples is not counted, nor is it elsewhere."""
    batch, _, height, width = out_shape
    out_channels, per_group, rows, columns = weight
    return 2 * batch * height * width * out_channels * per_group * rows * columns


def model_complexity(config: TrainConfig, build: Callable[[Any, int], nn.Module]) -> Complexity:
    """Size and cost of the model that a configuration describes, with COCO's number of classes."""
    (size,) = network_sizes(np.array([IMAGE]), config.scale, config.resize_rule)
    height, width = (-(-int(side) // SIZE_DIVISOR) * SIZE_DIVISOR for side in size)
    with torch.device("meta"):
        model = build(config, CLASSES).eval()
    return measure(model, (height, width))


def describe(size: Complexity) -> str:
    """One line about a model."""
    height, width = size.canvas
    return (
        f"{size.parameters:,} parameters with {CLASSES} classes, {size.trainable:,} of them trained; "
        f"{size.multiply_adds / 1e9:.1f} GFLOPs (multiply-adds) for an image of {height} x {width}"
    )

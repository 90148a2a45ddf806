"""From RGB bytes to a backbone's input, on the device."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

RGB_MEAN = (123.675, 116.28, 103.53)  # ImageNet's, of bytes; torchvision's weights expect them
RGB_STD = (58.395, 57.12, 57.375)
BGR_MEAN = (102.9801, 115.9465, 122.7717)  # Caffe2's (Detectron), with standard deviation 1


def normalize_pixels(
    images: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"], caffe2: bool
) -> Float[Tensor, "B 3 H W"]:
    """Float32 images as the backbone's weights expect them, exactly 0 outside each image's own size.

    Args:
        images: RGB bytes; what they hold outside `sizes` does not matter.
        sizes: height and width of each image inside the canvas, pixels.
        caffe2: BGR minus Caffe2's means; otherwise RGB minus ImageNet's means over its standard deviations.

    Note: padding is set after normalising, since a byte 0 is not a normalised 0. Channels are taken one at a time: a
    tensor of three means would have to be sent to the device, and the sender waits.
    """
    if caffe2:
        channels = [images[:, 2 - c].float() - BGR_MEAN[c] for c in range(3)]
    else:
        channels = [(images[:, c].float() - RGB_MEAN[c]) / RGB_STD[c] for c in range(3)]
    rows = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
    columns = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.stack(channels, dim=1).masked_fill(~inside, 0.0)

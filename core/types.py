"""What travels between data, model, losses and evaluation: named tuples of padded tensors.

Letters: B images, A anchors of all levels together, G objects of an image (padded, with a `valid` mask), C classes,
D detections of an image (padded likewise). Boxes are `xyxy`, float pixels of the padded network input.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

BACKGROUND = -1  # label and object index of an anchor that must predict "no object"
IGNORED = -2  # label and object index of an anchor that takes no part in the loss


class Targets(NamedTuple):
    """Ground truth of a batch. Rows where `valid` is False are padding: zero boxes, label 0."""

    boxes: Float[Tensor, "B G 4"]
    labels: Int[Tensor, "B G"]
    valid: Bool[Tensor, "B G"]
    sizes: Int[Tensor, "B 2"]  # height, width of each resized image; the canvas beyond is padding


class Batch(NamedTuple):
    """A padded batch as the loader makes it. Pixels are RGB bytes; they are normalised on the device."""

    images: UInt8[Tensor, "B 3 H W"]
    sizes: Int[Tensor, "B 2"]  # height, width of each resized image inside the canvas
    boxes: Float[Tensor, "B G 4"]
    labels: Int[Tensor, "B G"]
    valid: Bool[Tensor, "B G"]
    image_ids: Int[Tensor, " B"]  # ids of the annotation file
    original_sizes: Int[Tensor, "B 2"]  # height, width of the image file

    @property
    def targets(self) -> Targets:
        """The part that assigners and losses see."""
        return Targets(self.boxes, self.labels, self.valid, self.sizes)

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device; asynchronous where the memory is pinned."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Assignment(NamedTuple):
    """Which object each anchor learns from."""

    gt_index: Int[Tensor, "B A"]  # object of the image, or BACKGROUND or IGNORED
    labels: Int[Tensor, "B A"]  # class 0..C-1 of that object, or BACKGROUND or IGNORED

    @property
    def positive(self) -> Bool[Tensor, "B A"]:
        """Anchors that learn an object."""
        return self.gt_index >= 0


class Detections(NamedTuple):
    """Detections of a batch by falling score. Rows where `valid` is False are padding: zeros."""

    boxes: Float[Tensor, "B D 4"]
    scores: Float[Tensor, "B D"]
    labels: Int[Tensor, "B D"]
    valid: Bool[Tensor, "B D"]

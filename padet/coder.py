"""The coder of both stages, with SSD's variances 0.1 and 0.2 (spec section 3.1).

It works on `xyxy` boxes in pixels and gives the deltas that normalised (centre, size) boxes give: only ratios enter.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from core.boxes import CENTRE_STD, SIZE_STD, box_centres, decode_deltas

SMALLEST_RATIO = 1e-6  # of an object's side to its reference's: keeps the logarithm finite


def encode(references: Float[Tensor, "*#n 4"], boxes: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*n 4"]:
    """Deltas (dx, dy, dw, dh) that turn references into boxes.

    Args:
        references: anchors or promoted anchors, with sides above 0.
        boxes: objects; a side of 0 counts as a millionth of the reference's.
    """
    sides = references[..., 2:] - references[..., :2]
    shift = (box_centres(boxes) - box_centres(references)) / sides
    ratios = ((boxes[..., 2:] - boxes[..., :2]) / sides).clamp(min=SMALLEST_RATIO)
    return torch.cat([shift / CENTRE_STD, ratios.log() / SIZE_STD], dim=-1)


def decode(references: Float[Tensor, "*#n 4"], deltas: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*n 4"]:
    """Boxes from references and deltas, the inverse of `encode`, in float32 or better; not clipped to the image.

    No side grows by more than 1000 / 16.
    """
    return decode_deltas(references, deltas, clamp_both_sides=False)

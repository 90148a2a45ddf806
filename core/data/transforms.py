"""What happens to an image and its boxes on the way into a batch: pure functions of numpy arrays.

Sizes are (height, width) in pixels. Boxes in files are `xywh`; from `corner_boxes` on they are `xyxy`.
"""

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer, UInt8
from PIL import Image

from core.config import ResizeRule
from core.geometry import Geometry


def network_sizes(
    sizes: Integer[np.ndarray, "n 2"], scale: tuple[int, int], rule: ResizeRule
) -> Int64[np.ndarray, "n 2"]:
    """Sizes that images get in the network's input.

    Args:
        sizes: height and width, at least 1.
        scale: short side and limit of the long side, pixels; `square` makes both sides the first.
        rule: see `core.config.ResizeRule`.
    """
    if rule == "square":
        return np.full(sizes.shape, scale[0], np.int64)
    return resized_sizes(sizes, *scale, truncate=rule == "truncate")


def resized_sizes(
    sizes: Integer[np.ndarray, "n 2"], short_side: int, long_side: int, truncate: bool = False
) -> Int64[np.ndarray, "n 2"]:
    """Sizes after resizing the short side to `short_side`, or less where the long side would exceed `long_side`.

    640 x 480 (width x height) at 800/1333 becomes 1067 x 800, with `truncate` 1066 x 800 (spec PAA section 13,
    check 6).

    Args:
        sizes: height and width, at least 1.
        short_side: pixels.
        long_side: pixels.
        truncate: the authors' rule: the short side is rounded first, int(ratio * short) is the other (spec PAA
            section 8). Otherwise MMDetection's: both sides are int(side * factor + 0.5).

    Returns:
        Height and width, at least 1.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    short, long = np.minimum(height, width), np.maximum(height, width)
    if truncate:
        target = np.where(long / short * short_side > long_side, np.rint(long_side * short / long), short_side)
        target = np.maximum(target, 1)
        resized = np.stack([target * height / short, target * width / short], axis=1)
    else:
        factor = np.minimum(long_side / long, short_side / short)
        resized = np.stack([height * factor + 0.5, width * factor + 0.5], axis=1)
    return np.maximum(resized.astype(np.int64), 1)


def resize(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image at `size` = (height, width) by Pillow's bilinear filter, which averages when it shrinks.

    Note: Pillow is what the authors used and gives the same bytes on every machine; torchvision's resize takes half
    the time but differs by one grey level in one of a thousand values. MMDetection uses OpenCV without averaging.
    The result lies in memory plane by plane, as batches do: taking the planes out of Pillow is the fastest way there.
    """
    if image.shape[:2] == size:
        return image
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.stack([np.asarray(plane) for plane in resized.split()]).transpose(1, 2, 0)


def corner_boxes(xywh: Float64[np.ndarray, "n 4"], geometry: Geometry) -> Float64[np.ndarray, "n 4"]:
    """(x, y, w, h) to (x1, y1, x2, y2); in legacy geometry x2 is the last pixel, x + max(w - 1, 0) (spec section 2)."""
    far = xywh[:, :2] + np.maximum(xywh[:, 2:] - geometry.plus_one, 0)
    return np.concatenate([xywh[:, :2], far], axis=1)


def clip_boxes(
    boxes: Float64[np.ndarray, "n 4"], size: tuple[int, int], geometry: Geometry
) -> Float64[np.ndarray, "n 4"]:
    """Boxes cut to their image, [0, W - plus_one] x [0, H - plus_one]."""
    height, width = size
    limits = np.array([width, height, width, height]) - geometry.plus_one
    return np.clip(boxes, 0, limits)


def usable_boxes(boxes: Float64[np.ndarray, "n 4"], crowd: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Boxes that may be targets: no crowd, x2 > x1 and y2 > y1 after clipping (spec PAA section 2)."""
    return ~crowd & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)


def scale_boxes(
    boxes: Float64[np.ndarray, "n 4"], size: tuple[int, int], resized: tuple[int, int]
) -> Float64[np.ndarray, "n 4"]:
    """Boxes of an image of `size` in the coordinates of the image resized to `resized`, each axis by its own ratio."""
    factors = np.array([resized[1] / size[1], resized[0] / size[0]])
    return boxes * np.tile(factors, 2)


def flip_boxes(boxes: Float64[np.ndarray, "n 4"], width: int, geometry: Geometry) -> Float64[np.ndarray, "n 4"]:
    """Boxes of the mirrored image: x becomes width - plus_one - x (spec PAA section 2)."""
    flipped = boxes.copy()
    flipped[:, [0, 2]] = width - geometry.plus_one - boxes[:, [2, 0]]
    return flipped

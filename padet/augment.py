"""SSD's augmentation (spec section 4.4): colours, expansion, crop, resizing to a square, mirror.

Every random choice is drawn first, as plain numbers; what they do to pixels and boxes are functions without chance.
Colours change only where the crop looks: they are pointwise, so the order of the two does not matter.

Deviation: resizing is Pillow's. Its linear, cubic and Lanczos filters average when they shrink, OpenCV's do not; box
filter and nearest neighbour stand for OpenCV's area and nearest.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8
from PIL import Image

from core.data.loader import Augment, Sample
from core.data.transforms import flip_boxes, scale_boxes
from core.geometry import MODERN
from core.pixels import RGB_MEAN
from padet.config import Config
from padet.model import CAFFE_MEAN

BRIGHTNESS = 32.0  # largest change of a byte
GAIN = (0.5, 1.5)  # of contrast and of saturation
HUE = 36.0  # largest turn in degrees: 18 on OpenCV's scale of 180
LARGEST_EXPANSION = 4.0  # of both sides
MIN_IOUS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)  # of a crop with some object; None: no crop, 0: any crop
TRIALS = 50  # crops before another minimum is drawn
SCALE = (0.3, 1.0)  # of a crop: square root of its share of the image's area
ASPECT = (0.5, 2.0)  # of a crop, its share of the width over its share of the height
FILTERS = (
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
    Image.Resampling.NEAREST,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
ROWS = 32  # of an image whose colours are shifted at once
MIN_SIDE = 1.0  # boxes with a smaller side after resizing are dropped, pixels

Colour = tuple[int, int, int]  # bytes, RGB


class Window(NamedTuple):
    """A rectangle of whole pixels; it may reach beyond its image."""

    left: int
    top: int
    width: int
    height: int


class Distortion(NamedTuple):
    """What happens to colours; each neutral value leaves them as they are."""

    brightness: float = 0.0  # added to every byte
    contrast: float = 1.0  # factor of every byte
    saturation: float = 1.0  # factor of the saturation
    hue: float = 0.0  # turn of the hue, degrees
    contrast_first: bool = True  # contrast before saturation and hue, otherwise after both


def fill_colour(config: Config) -> Colour:
    """The mean colour that the backbone's weights expect, in whole bytes: what expansion puts around an image."""
    red, green, blue = RGB_MEAN if config.pixels == "imagenet" else CAFFE_MEAN[::-1]
    return round(red), round(green), round(blue)


def augmentation(config: Config) -> Augment | None:
    """The augmentation of a configuration, as `core.commands.train` takes it."""
    return partial(augment, fill=fill_colour(config)) if config.augment == "ssd" else None


def augment(sample: Sample, size: tuple[int, int], random: np.random.Generator, fill: Colour) -> Sample:
    """One image of a file as training sees it: of `size` = (height, width), with the boxes that are left.

    Args:
        sample: image, boxes in its pixels, labels; unchanged.
        size: of the result.
        random: source of every choice.
        fill: what is outside the image.
    """
    height, width, _ = sample.image.shape
    distortion = draw_distortion(random)
    place = draw_expansion(random, width, height)
    boxes = sample.boxes + np.tile([place.left, place.top], 2)
    crop = draw_crop(random, boxes, Window(0, 0, place.width, place.height))
    pixel_filter = FILTERS[int(random.random() * len(FILTERS))]
    mirror = random.random() < 0.5

    window = Window(crop.left - place.left, crop.top - place.top, crop.width, crop.height)  # in the image's pixels
    view = look(sample.image, window, distortion, fill)
    image = np.asarray(view.resize((size[1], size[0]), pixel_filter))
    keep = centres_inside(boxes, crop)
    boxes = scale_boxes(crop_boxes(boxes[keep], crop), (crop.height, crop.width), size)
    if mirror:
        image, boxes = image[:, ::-1], flip_boxes(boxes, size[1], MODERN)
    thick = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
    return Sample(image, boxes[thick], sample.labels[keep][thick])


# What is drawn


def _uniform(random: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * random.random()


def _half(random: np.random.Generator, low: float, high: float, neutral: float) -> float:
    """A uniform number half of the time, otherwise the neutral one."""
    return _uniform(random, low, high) if random.random() < 0.5 else neutral


def draw_distortion(random: np.random.Generator) -> Distortion:
    """Each change with probability 0.5, in one of two orders."""
    brightness = _half(random, -BRIGHTNESS, BRIGHTNESS, 0.0)
    contrast, saturation = _half(random, *GAIN, 1.0), _half(random, *GAIN, 1.0)
    hue = _half(random, -HUE, HUE, 0.0)
    return Distortion(brightness, contrast, saturation, hue, contrast_first=random.random() < 0.5)


def draw_expansion(random: np.random.Generator, width: int, height: int) -> Window:
    """A canvas up to four times as wide and high as the image, and where the image is on it; half of the time none.

    Returns:
        Left and top of the image on the canvas, width and height of the canvas.
    """
    if random.random() >= 0.5:
        return Window(0, 0, width, height)
    ratio = _uniform(random, 1.0, LARGEST_EXPANSION)
    canvas_width, canvas_height = int(width * ratio), int(height * ratio)
    left, top = random.random(2) * (canvas_width - width + 1, canvas_height - height + 1)
    return Window(int(left), int(top), canvas_width, canvas_height)


def draw_crop(random: np.random.Generator, boxes: Float64[np.ndarray, "g 4"], canvas: Window) -> Window:
    """What is kept of a canvas: all of it, or a crop that shows enough of some object.

    A minimum is drawn, then up to 50 crops, of which the first that is accepted is taken; if none is, another minimum.

    Args:
        random: source of the choices.
        boxes: objects on the canvas.
        canvas: its left and top are 0.

    Note: without objects there is nothing to show, so the first crop is taken.
    """
    while True:
        min_iou = MIN_IOUS[int(random.random() * len(MIN_IOUS))]
        if min_iou is None:
            return canvas
        crops = draw_windows(random, canvas.width, canvas.height)
        good = np.flatnonzero(accepted(crops, boxes, min_iou)) if len(boxes) else np.arange(1)
        if len(good):
            return Window(*crops[good[0]].tolist())


def draw_windows(random: np.random.Generator, width: int, height: int) -> Int64[np.ndarray, "n 4"]:
    """50 crops of an image: left, top, width, height in whole pixels.

    Note: the aspect is uniform between the limits that the scale leaves, [scale^2, 1 / scale^2], as in the Caffe code.
    """
    scale, aspect, x, y = random.random((4, TRIALS))
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * scale
    low, high = np.maximum(ASPECT[0], scale**2), np.minimum(ASPECT[1], 1 / scale**2)
    root = np.sqrt(low + (high - low) * aspect)
    shares = np.stack([scale * root, scale / root], axis=1)
    sides = np.clip(np.rint(shares * (width, height)), 1, (width, height))
    corners = np.floor(np.stack([x, y], axis=1) * (np.array([width, height]) - sides + 1))
    return np.concatenate([corners, sides], axis=1).astype(np.int64)


def accepted(
    crops: Int64[np.ndarray, "n 4"], boxes: Float64[np.ndarray, "g 4"], min_iou: float
) -> Bool[np.ndarray, " n"]:
    """Crops (left, top, width, height) with an IoU of `min_iou` or more with some object, and some object's centre."""
    low, high = crops[:, None, :2], crops[:, None, :2] + crops[:, None, 2:]
    sides = np.minimum(high, boxes[:, 2:]) - np.maximum(low, boxes[:, :2])
    intersection = np.maximum(sides, 0).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    ious = intersection / (crops[:, None, 2:].prod(axis=2) + areas - intersection)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((low < centres) & (centres < high)).all(axis=2)
    return (ious >= min_iou).any(axis=1) & inside.any(axis=1)


# What it does to boxes


def centres_inside(boxes: Float64[np.ndarray, "g 4"], crop: Window) -> Bool[np.ndarray, " g"]:
    """Boxes whose centre is strictly inside the crop."""
    low = np.array(crop[:2])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((low < centres) & (centres < low + crop[2:])).all(axis=1)


def crop_boxes(boxes: Float64[np.ndarray, "g 4"], crop: Window) -> Float64[np.ndarray, "g 4"]:
    """Boxes in pixels of the crop, cut to it."""
    return np.clip(boxes - np.tile(crop[:2], 2), 0, np.tile(crop[2:], 2))


# What it does to pixels


def look(image: UInt8[np.ndarray, "h w 3"], window: Window, distortion: Distortion, fill: Colour) -> Image.Image:
    """What a window of an image shows, with changed colours; the fill colour, unchanged, outside the image."""
    height, width, _ = image.shape
    left, top = max(window.left, 0), max(window.top, 0)
    right, bottom = min(window.left + window.width, width), min(window.top + window.height, height)
    view = Image.new("RGB", (window.width, window.height), fill)
    if left < right and top < bottom:
        seen = distort(image[top:bottom, left:right], distortion)
        view.paste(Image.fromarray(seen), (left - window.left, top - window.top))
    return view


def distort(image: UInt8[np.ndarray, "h w 3"], distortion: Distortion) -> UInt8[np.ndarray, "h w 3"]:
    """Brightness, then contrast, saturation and hue, or saturation, hue and contrast.

    Note: every change ends in bytes, rounded and clamped to [0, 255], as in the Caffe code.
    """
    brightness, contrast, saturation, hue, contrast_first = distortion
    brighter, stronger = np.arange(256.0) + brightness, np.arange(256.0) * contrast
    before = _bytes(stronger)[_bytes(brighter)] if contrast_first else _bytes(brighter)
    image = np.asarray(Image.fromarray(image).point(before.tolist() * 3))
    if saturation != 1 or hue:
        image = shift_colours(image, saturation, hue)
    return image if contrast_first else np.asarray(Image.fromarray(image).point(_bytes(stronger).tolist() * 3))


def _bytes(values: Float64[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n"]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def shift_colours(image: UInt8[np.ndarray, "h w 3"], saturation: float, hue: float) -> UInt8[np.ndarray, "h w 3"]:
    """Saturation times a factor, at most 1, and hue turned by degrees; the value, the largest channel, stays.

    With chroma = max - min the saturation is chroma / max, and the hue 60 degrees times h in [0, 6): 0 red, 2 green, 4
    blue. A channel is value - chroma * (1 - t), where t falls from 1 to 0 as h goes from 1 to 2 away from that of the
    channel.

    Args:
        image: RGB bytes.
        saturation: factor.
        hue: degrees, in [-60, 60]; 60 turn red into yellow.
    """
    shifted = np.empty_like(image)
    for row in range(0, len(image), ROWS):  # parts that fit the processor's cache
        red, green, blue = np.ascontiguousarray(image[row : row + ROWS].transpose(2, 0, 1), np.float32)
        value = np.maximum(np.maximum(red, green), blue)
        chroma = value - np.minimum(np.minimum(red, green), blue)
        share = np.float32(1) / np.maximum(chroma, 1)  # of a grey pixel the hue is 0, and does not matter
        h = np.where(
            value == red,
            (green - blue) * share,
            np.where(value == green, 2 + (blue - red) * share, 4 + (red - green) * share),
        )
        h += np.float32(hue / 60)
        h += 6 * (h < 0).astype(np.float32)  # 6 and more cannot be: h was 5 at most
        np.minimum(chroma * np.float32(saturation), value, out=chroma)
        for channel, away in enumerate((3 - np.abs(h - 3), np.abs(h - 2), np.abs(h - 4))):
            plane = value - chroma * np.clip(away - 1, 0, 1)
            shifted[row : row + ROWS, :, channel] = plane + np.float32(0.5)
    return shifted

"""Boxes, names and scores drawn into an image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Tableau's ten colours: far apart, also for most colour-blind readers; class c takes colour c modulo ten.
PALETTE = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (127, 127, 127),
    (188, 189, 34),
    (23, 190, 207),
)


def draw_detections(
    image: np.ndarray, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> Image.Image:
    """A copy of the image with every box, its class name and score, best on top.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (n, 4) xyxy pixels of this image.
        scores: (n,) in [0, 1].
        labels: (n,) 0..C-1.
        names: C class names.
    """
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    unit = max(1.0, min(canvas.size) / 400)  # line width and text grow with the picture
    font = ImageFont.load_default(size=11 * unit)
    for index in np.argsort(scores, kind="stable"):
        colour = PALETTE[int(labels[index]) % len(PALETTE)]
        x1, y1, x2, y2 = (float(value) for value in boxes[index])
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=max(1, round(1.5 * unit)))
        _tag(pen, f"{names[int(labels[index])]} {scores[index]:.2f}", (x1, y1), colour, font, canvas.size)
    return canvas


def _tag(
    pen: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[float, float],
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    canvas: tuple[int, int],
) -> None:
    """The label above the box's upper left corner, moved so that it stays inside the picture."""
    _, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right + 4, bottom + 2
    x = min(max(corner[0], 0), max(0, canvas[0] - width))
    y = corner[1] - height if corner[1] >= height else max(corner[1], 0)
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    dark = sum(colour) > 450  # black text on light colours
    pen.text((x + 2, y + 1 - top / 2), text, fill=(0, 0, 0) if dark else (255, 255, 255), font=font)

"""Drawn images with known boxes: `--data shapes`, the data set of README, tests and benchmarks.

An image is a pure function of (seed, split, index). A scene is planned first (sizes, kinds, places and the visible
pixels of every shape, which give its box) and painted when the image is read; planning costs about a millisecond.
A shape's pixels are those that it covers at least half and that no later shape hides; its box holds exactly these.
"""

import colorsys
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int8, UInt8
from PIL import Image, ImageDraw

from core.data.table import Category, Table, cached_table, pack_names
from core.errors import UserError

KINDS = ("circle", "square", "triangle", "star")
HUES = (0.98, 0.60, 0.34, 0.13)  # red, blue, green, gold: a network without pretraining sees kinds sooner by colour
HUE_SPREAD = 0.06  # to both sides
CATEGORIES = tuple(Category(i, name) for i, name in enumerate(KINDS, start=1))
SPLITS = {"train": 4000, "val": 200, "test": 200}  # images of each split
LICENCE = "drawn by core/shapes.py; no rights of others"
VERSION = 2  # of the drawings: a change makes cached boxes stale

LONG_SIDES = (256, 320)  # pixels, both ends included
SHORT_SIDES = (192, 256)
PORTRAIT = 0.4  # share of images that are higher than wide
MAX_SHAPES = 6  # of an image; at least one
MIN_VISIBLE = 0.6  # a shape of which less would be seen, for others or the border, is not placed
SUPERSAMPLING = 4  # of masks, per side: smooth edges
PLAN, PAINT = range(2)  # independent random streams of an image


class Shape(NamedTuple):
    """An object of a scene. Its pixels lie in the square of side 2 * radius around its centre."""

    kind: int  # position in KINDS
    x: float  # centre, pixels
    y: float
    radius: float  # of the circumscribed circle, pixels
    angle: float  # radians
    hue: float  # 0..1


class Scene(NamedTuple):
    """Planned image: shapes from back to front and which pixels each of them owns."""

    height: int
    width: int
    shapes: tuple[Shape, ...]
    owner: Int8[np.ndarray, "h w"]  # position in `shapes` of the shape seen at a pixel, or -1

    @property
    def boxes_xywh(self) -> Float64[np.ndarray, "n 4"]:
        """Left, top, width and height of every shape's visible pixels."""
        return np.array([_extent(self.owner == i) for i in range(len(self.shapes))], dtype=np.float64).reshape(-1, 4)


def random_stream(seed: int, split: str, index: int, stream: int) -> np.random.Generator:
    """Random numbers for one purpose of one image."""
    key = np.array([seed % 2**64, VERSION], np.uint64)  # a list would pass through float64
    counter = [0, stream, index, list(SPLITS).index(split)]
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def plan_scene(seed: int, split: str, index: int) -> Scene:
    """The shapes of an image, without painting it."""
    rng = random_stream(seed, split, index, PLAN)
    long, short = (int(rng.integers(low, high + 1)) for low, high in (LONG_SIDES, SHORT_SIDES))
    height, width = (long, short) if rng.random() < PORTRAIT else (short, long)
    count = int(rng.integers(1, MAX_SHAPES + 1))
    radii = sorted((_random_radius(rng, short) for _ in range(count)), reverse=True)  # small ones in front
    owner = np.full((height, width), -1, np.int8)
    shapes: list[Shape] = []
    areas: list[int] = []  # pixels of each shape if nothing hid it
    for radius in radii:
        for _ in range(8):  # tries to find a place where it and all before stay visible
            shape = _random_shape(rng, radius, height, width)
            if (changed := _place(shape, owner, areas)) is not None:
                owner = changed
                shapes.append(shape)
                break
    return Scene(height, width, tuple(shapes), owner)


def _random_radius(rng: np.random.Generator, short: int) -> float:
    """Mostly 24 to 120 px across; a tenth down to 8 px, a tenth up to nine tenths of the short side."""
    low, high = (24, 120) if (draw := rng.random()) < 0.8 else (8, 24) if draw < 0.9 else (120, 0.9 * short)
    return math.exp(rng.uniform(math.log(low), math.log(high))) / 2


def _random_shape(rng: np.random.Generator, radius: float, height: int, width: int) -> Shape:
    kind = int(rng.integers(len(KINDS)))
    hue = (HUES[kind] + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 1
    inside = radius * rng.choice([1.0, 0.7], p=[0.85, 0.15])  # some are cut by the border
    x, y = (rng.uniform(min(inside, side / 2), max(side - inside, side / 2)) for side in (width, height))
    turn = rng.uniform(-1, 1) * (math.pi / 10 if KINDS[kind] == "square" else math.pi)  # a square stays no diamond
    return Shape(kind, x, y, max(radius, 5.0), turn, hue)


def _place(shape: Shape, owner: Int8[np.ndarray, "h w"], areas: list[int]) -> Int8[np.ndarray, "h w"] | None:
    """The owner map with one more shape, or None if that shape or an earlier one would be hidden too much.

    `areas` are the whole areas of the earlier shapes; the new one's is appended when it is placed.
    """
    coverage, top, left = shape_coverage(shape)
    solid = coverage >= 0.5
    rows, columns, part = clip_window(solid.shape, top, left, owner.shape)
    mask = solid[part]
    if mask.sum() < MIN_VISIBLE * solid.sum():
        return None
    changed = owner.copy()
    changed[rows, columns][mask] = len(areas)
    for i in np.unique(owner[rows, columns][mask]):
        if i >= 0 and (changed == i).sum() < MIN_VISIBLE * areas[i]:
            return None
    areas.append(int(solid.sum()))
    return changed


def outline(shape: Shape, scale: float = 1.0) -> Float64[np.ndarray, "n 2"]:
    """Corners (x, y) of a shape around the origin; a circle is a polygon with sides below a pixel."""
    name = KINDS[shape.kind]
    corners = {"circle": max(24, int(4 * shape.radius)), "square": 4, "triangle": 3, "star": 10}[name]
    angles = shape.angle + np.arange(corners) * (2 * math.pi / corners)
    radii = np.full(corners, shape.radius * scale)
    if name == "star":
        radii[1::2] *= 0.45
    if name == "square":
        angles = angles + math.pi / 4
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def shape_coverage(shape: Shape, scale: float = 1.0) -> tuple[Float32[np.ndarray, "s s"], int, int]:
    """How much of each pixel a shape covers, 0..1, on a square window; and the window's top and left pixel."""
    left, top = math.floor(shape.x - shape.radius) - 1, math.floor(shape.y - shape.radius) - 1
    side = math.ceil(2 * shape.radius) + 4
    canvas = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    centre = np.array([shape.x - left, shape.y - top])
    corners = (outline(shape, scale) + centre) * SUPERSAMPLING - 0.5
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in corners.tolist()], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255, top, left


def clip_window(
    window: tuple[int, ...], top: int, left: int, image: tuple[int, ...]
) -> tuple[slice, slice, tuple[slice, slice]]:
    """Rows and columns of the image under a window, and the part of the window that lies inside."""
    y1, x1, y2, x2 = max(top, 0), max(left, 0), min(top + window[0], image[0]), min(left + window[1], image[1])
    return slice(y1, y2), slice(x1, x2), (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))


def _extent(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def draw_image(seed: int, split: str, index: int) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of an image: background, clutter, shapes from back to front, noise."""
    scene = plan_scene(seed, split, index)
    rng = random_stream(seed, split, index, PAINT)
    dark = rng.random() < 0.5
    image = _paint_background(rng, scene.height, scene.width, dark)
    for shape in scene.shapes:
        _paint_shape(rng, image, shape, dark)
    image += rng.standard_normal((scene.height, scene.width, 1), dtype=np.float32) * rng.uniform(0.0, 0.02)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _colour(hue: float, saturation: float, value: float) -> Float32[np.ndarray, " 3"]:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)


def _ramp(rng: np.random.Generator, height: int, width: int) -> Float32[np.ndarray, "h w 1"]:
    """0 to 1 across the window in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.linspace(-0.5, 0.5, height), np.linspace(-0.5, 0.5, width)
    slope = x * math.cos(angle) + y[:, None] * math.sin(angle)
    return (0.5 + slope / (abs(math.cos(angle)) + abs(math.sin(angle)))).astype(np.float32)[..., None]


def _paint_background(rng: np.random.Generator, height: int, width: int, dark: bool) -> Float32[np.ndarray, "h w 3"]:
    """A soft two-colour gradient with thin lines and dots, which are no objects."""
    low, high = (0.10, 0.26) if dark else (0.84, 0.97)
    first, second = (_colour(rng.random(), rng.uniform(0.1, 0.3), rng.uniform(low, high)) for _ in range(2))
    ramp = _ramp(rng, height, width)
    image = first * (1 - ramp) + second * ramp
    layer = Image.fromarray((image * 255).astype(np.uint8))
    canvas = ImageDraw.Draw(layer)
    for _ in range(int(rng.integers(0, 9))):
        shade = _colour(rng.random(), 0.2, rng.uniform(0.3, 0.42) if dark else rng.uniform(0.62, 0.76))
        fill = tuple(int(255 * channel) for channel in shade)
        x1, x2 = rng.uniform(0, width, 2)
        y1, y2 = rng.uniform(0, height, 2)
        if rng.random() < 0.5:
            canvas.line([x1, y1, x2, y2], fill=fill, width=int(rng.integers(1, 3)))
        else:
            for _ in range(int(rng.integers(3, 12))):
                x, y = rng.normal(x1, 14), rng.normal(y1, 14)
                canvas.ellipse([x, y, x + 2, y + 2], fill=fill)
    return np.asarray(layer, dtype=np.float32) / 255


def _paint_shape(rng: np.random.Generator, image: Float32[np.ndarray, "h w 3"], shape: Shape, dark: bool) -> None:
    """Blends one shape into the image: a texture, and a rim where there is room for one."""
    coverage, top, left = shape_coverage(shape)
    base = _colour(shape.hue, rng.uniform(0.65, 0.95), rng.uniform(0.85, 1.0) if dark else rng.uniform(0.55, 0.85))
    fill = np.broadcast_to(base, (*coverage.shape, 3))
    if shape.radius > 10:  # smaller ones are plain
        fill = _texture(rng, base, *coverage.shape)
        inner = shape_coverage(shape, scale=1 - 2.2 / shape.radius)[0][..., None]
        fill = fill * inner + base * 0.55 * (1 - inner)
    rows, columns, part = clip_window(coverage.shape, top, left, image.shape)
    alpha = coverage[part][..., None]
    image[rows, columns] = image[rows, columns] * (1 - alpha) + fill[part] * alpha


def _texture(
    rng: np.random.Generator, base: Float32[np.ndarray, " 3"], height: int, width: int
) -> Float32[np.ndarray, "h w 3"]:
    """Plain, shaded, striped or chequered in two tones of one colour."""
    ramp = _ramp(rng, height, width)
    other = base * rng.uniform(0.6, 0.75)
    period = rng.uniform(5, 12)
    y, x = np.mgrid[:height, :width]
    mixes = {
        "plain": np.zeros_like(ramp),
        "shaded": ramp,
        "striped": 0.5 + 0.5 * np.sin(ramp * (height + width) / period * math.pi),
        "chequered": ((x // period + y // period) % 2)[..., None],
    }
    mix = mixes[rng.choice(list(mixes), p=[0.35, 0.35, 0.2, 0.1])]
    return (base * (1 - mix) + other * mix).astype(np.float32)


class DrawnImages:
    """Reader of a table of drawn images."""

    def __init__(self, seed: int, split: str) -> None:
        self.seed, self.split = seed, split

    def read(self, table: Table, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Draws image `index`."""
        return draw_image(self.seed, self.split, index)


def shapes_table(split: str, count: int, seed: int) -> Table:
    """The first `count` drawn images of a split, with their boxes planned now or read from the cache."""
    key = {"shapes": VERSION, "split": split, "count": count, "seed": seed}
    images = DrawnImages(seed, split)
    return cached_table(f"shapes/{split}/{count}/{seed}", key, lambda: _plan_table(split, count, seed), images)


def _plan_table(split: str, count: int, seed: int) -> Table:
    heights, widths = np.zeros(count, np.int32), np.zeros(count, np.int32)
    boxes: list[Float64[np.ndarray, "n 4"]] = [np.zeros((0, 4))]
    kinds: list[int] = []
    offsets = np.zeros(count + 1, np.int64)
    for index in range(count):
        scene = plan_scene(seed, split, index)
        heights[index], widths[index] = scene.height, scene.width
        boxes.append(scene.boxes_xywh)
        kinds += [shape.kind for shape in scene.shapes]
        offsets[index + 1] = len(kinds)
    xywh = np.concatenate(boxes)
    name_offsets, name_bytes = pack_names([f"{index + 1:06d}.png" for index in range(count)])
    return Table(
        categories=CATEGORIES,
        image_ids=np.arange(1, count + 1, dtype=np.int64),
        heights=heights,
        widths=widths,
        name_offsets=name_offsets,
        name_bytes=name_bytes,
        box_offsets=offsets,
        boxes_xywh=xywh,
        labels=np.array(kinds, dtype=np.int32),
        crowd=np.zeros(len(kinds), bool),
        areas=xywh[:, 2] * xywh[:, 3],
        annotation_ids=np.arange(1, len(kinds) + 1, dtype=np.int64),
        difficult=np.zeros(len(kinds), bool),
        images=DrawnImages(seed, split),
        source=f"shapes {split}",
        licence=LICENCE,
    )


def write_shapes(folder: Path, counts: Mapping[str, int], seed: int) -> None:
    """Writes drawn images as a COCO folder: annotations/instances_<split>.json and <split>/<number>.png.

    The pixels are those of `--data shapes`. The folder appears complete or not at all.

    Args:
        folder: new or empty.
        counts: images of each split; 0 leaves the split out.
        seed: of the drawings.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not empty; name a new folder")
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}-") as temporary:
            unfinished = Path(temporary) / "shapes"
            (unfinished / "annotations").mkdir(parents=True)
            for split, count in counts.items():
                if count:
                    _write_split(unfinished, _plan_table(split, count, seed), split)
            unfinished.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def _write_split(folder: Path, table: Table, split: str) -> None:
    (folder / split).mkdir()
    for index in range(len(table)):
        Image.fromarray(table.read_image(index)).save(folder / split / table.name(index))
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco_content(table)))


def coco_content(table: Table) -> dict[str, Any]:
    """A table as the content of a COCO annotation file."""
    images = [
        {"id": int(i), "file_name": table.name(row), "height": int(height), "width": int(width)}
        for row, (i, height, width) in enumerate(zip(table.image_ids, table.heights, table.widths, strict=True))
    ]
    owners = np.repeat(table.image_ids, np.diff(table.box_offsets))
    annotations = [
        {
            "id": int(table.annotation_ids[row]),
            "image_id": int(owners[row]),
            "category_id": table.categories[table.labels[row]].id,
            "bbox": table.boxes_xywh[row].tolist(),
            "area": float(table.areas[row]),
            "iscrowd": int(table.crowd[row]),
        }
        for row in range(len(table.labels))
    ]
    categories = [category._asdict() for category in table.categories]
    licences = [{"id": 1, "name": table.licence}] if table.licence else []
    return {"licenses": licences, "images": images, "annotations": annotations, "categories": categories}

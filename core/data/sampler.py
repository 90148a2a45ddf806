"""Which images form which training batch: pure functions of (seed, epoch, batch), so any step can be the first.

Images are grouped by orientation (portrait: higher than wide). Each group is a stream, one permutation of its images
after another; a batch takes the next `batch_size` images of one stream, so every batch is full, every image comes
exactly once in each pass of its stream, and a batch at the seam holds the end of one pass and the start of the next.
Epoch e holds the batches that end within the first e + 1 passes of their streams, in random order of the groups; the
number of batches of an epoch is images / batch_size, rounded up or down by at most one per group. A set smaller than a
batch fills it with several passes.

Deviation: orientation and scale are drawn per global batch, the authors draw the scale per image. In exchange there
are few canvases: one per orientation and 32 px of scale, which bounds the number of shapes to compile. Where every
image becomes the same square there is one canvas and one group.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt64

from core.anchors import SIZE_DIVISOR
from core.config import TrainConfig
from core.data.table import Table
from core.data.transforms import network_sizes
from core.errors import UserError

MIN_SIDE = 1.0  # a training image needs a box with both sides above this many pixels (spec PAA section 8)
GROUP_ORDER, SHORT_SIDES, FLIPS, IMAGE_ORDER = range(4)  # independent random streams of a seed
AUGMENTATION = IMAGE_ORDER + 2  # each of two groups has its own order


class BatchPlan(NamedTuple):
    """A global batch before anything is read."""

    images: Int64[np.ndarray, " B"]  # rows of the table
    flips: Bool[np.ndarray, " B"]
    short_side: int  # pixels, before the limit of ...
    long_side: int  # ... the other side
    canvas: tuple[int, int]  # height, width: every resized image fits


def random_bits(seed: int, stream: int, *position: int, count: int) -> UInt64[np.ndarray, " n"]:
    """64 random bits, `count` times, as a function of seed, stream and up to two further numbers.

    Philox is counter-based: neighbouring positions give independent numbers. Its raw bits are the part of numpy's
    random numbers that never changes between versions.
    """
    return _philox(seed, stream, *position).random_raw(count)


def augmentation_random(seed: int, step: int, place: int) -> np.random.Generator:
    """The random numbers for one image of a run: that at `place` of the global batch of `step`."""
    return np.random.Generator(_philox(seed, AUGMENTATION, step, place))


def _philox(seed: int, stream: int, *position: int) -> np.random.Philox:
    key = np.array([seed % 2**64, stream], np.uint64)  # a list would pass through float64
    return np.random.Philox(key=key, counter=[0, 0, *position, *[0] * (2 - len(position))])


@lru_cache(maxsize=8)
def permutation(seed: int, stream: int, position: int, count: int) -> Int64[np.ndarray, " n"]:
    """A random order of 0 .. count - 1."""
    return np.argsort(random_bits(seed, stream, position, count=count), kind="stable")


def training_images(table: Table, empty_images: str) -> Int64[np.ndarray, " n"]:
    """Rows of the images to train on: all (`keep`), or those with a box that is no crowd and no dot (`skip`)."""
    if empty_images == "keep":
        return np.arange(len(table))
    good = ~table.crowd & (table.boxes_xywh[:, 2:] > MIN_SIDE).all(axis=1)
    before = np.zeros(len(good) + 1, np.int32)  # good boxes before each box
    np.cumsum(good, out=before[1:])
    rows = np.flatnonzero(np.diff(before[table.box_offsets]))
    if len(rows) == 0:
        raise UserError(
            f"{table.source}: no image has a box that is wider and higher than {MIN_SIDE:g} px and no crowd; boxes are "
            "x, y, width, height in pixels (empty_images keep would train on background only)"
        )
    return rows


def round_up(value: int, divisor: int = SIZE_DIVISOR) -> int:
    """The next multiple of `divisor`."""
    return -(-value // divisor) * divisor


@dataclass(frozen=True, eq=False)
class Sampler:
    """The batches of a run. `groups` are rows of the table, `sizes` each group's distinct (height, width)."""

    groups: tuple[Int64[np.ndarray, " _"], ...]
    sizes: tuple[Integer[np.ndarray, "_ 2"], ...]
    config: TrainConfig

    def batch(self, step: int) -> BatchPlan:
        """The batch that step `step` (from 1) trains on."""
        config, size, index = self.config, self.config.batch_size, step - 1
        group, turn = self._turn(index)
        images = self._take(group, turn * size, size)
        flips = random_bits(config.seed, FLIPS, index, count=size) >> np.uint64(63) == 1
        short_side = self._short_side(index)
        return BatchPlan(images, flips, short_side, config.scale[1], self.canvas(group, short_side))

    def canvas(self, group: int, short_side: int) -> tuple[int, int]:
        """The canvas of an orientation and a short side: the same for all short sides of one bucket of 32 px."""
        return _canvas(self, group, min(round_up(short_side), self.config.short_sides[1]))

    def _short_side(self, index: int) -> int:
        low, high = self.config.short_sides
        return low + int(random_bits(self.config.seed, SHORT_SIDES, index, count=1)[0] % np.uint64(high - low + 1))

    def _batches_before(self, epoch: int) -> list[int]:
        return [epoch * len(group) // self.config.batch_size for group in self.groups]

    def _turn(self, index: int) -> tuple[int, int]:
        """The group, and how many batches of that group came before, of global batch `index` (from 0)."""
        epoch = index * self.config.batch_size // sum(map(len, self.groups))
        while sum(self._batches_before(epoch + 1)) <= index:
            epoch += 1
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        counts = [b - a for a, b in zip(before, after, strict=True)]
        groups, turns = _turns(self.config.seed, epoch, tuple(counts))
        group = int(groups[index - sum(before)])
        return group, before[group] + int(turns[index - sum(before)])

    def _take(self, group: int, start: int, count: int) -> Int64[np.ndarray, " n"]:
        """`count` images of a group's stream from position `start`."""
        rows, parts = self.groups[group], []
        while count:
            turn, offset = divmod(start, len(rows))
            order = permutation(self.config.seed, IMAGE_ORDER + group, turn, len(rows))
            parts.append(rows[order[offset : offset + count]])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)


@lru_cache(maxsize=64)
def _canvas(sampler: Sampler, group: int, largest: int) -> tuple[int, int]:
    """The canvas of a group whose images get a short side of up to `largest`; millions of images differ in size."""
    config = sampler.config
    resized = network_sizes(sampler.sizes[group], (largest, config.scale[1]), config.resize_rule)
    height, width = resized.max(axis=0)
    return round_up(int(height)), round_up(int(width))


@lru_cache(maxsize=2)
def _turns(seed: int, epoch: int, counts: tuple[int, ...]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """For each batch of an epoch its group, and how many of that group come before it in the epoch."""
    order = permutation(seed, GROUP_ORDER, epoch, sum(counts))
    groups = np.repeat(np.arange(len(counts)), counts)[order]
    turns = np.zeros(len(groups), np.int64)
    for group, count in enumerate(counts):
        turns[groups == group] = np.arange(count)
    return groups, turns


def _distinct(heights: Integer[np.ndarray, " n"], widths: Integer[np.ndarray, " n"]) -> Int64[np.ndarray, "m 2"]:
    """The different (height, width), in rising order; a pair packed into one number sorts much faster."""
    packed = np.unique(heights.astype(np.int64) << 32 | widths)
    return np.stack([packed >> 32, packed & (2**32 - 1)], axis=1)


def training_sampler(table: Table, config: TrainConfig) -> Sampler:
    """The sampler of a training set. UserError if nothing is left to train on."""
    rows = training_images(table, config.empty_images)
    portrait = (table.heights[rows] > table.widths[rows]) & (config.resize_rule != "square")
    groups = tuple(group for group in (rows[~portrait], rows[portrait]) if len(group))
    sizes = tuple(_distinct(table.heights[group], table.widths[group]) for group in groups)
    return Sampler(groups, sizes, config)

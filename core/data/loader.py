"""Batches for training and evaluation, made in worker processes; the same for any number of them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float64, Int32, Int64, UInt8
from torch.utils.data import DataLoader, Dataset

from core.anchors import SIZE_DIVISOR
from core.config import TrainConfig
from core.data.sampler import BatchPlan, Sampler, augmentation_random, training_sampler
from core.data.table import Table
from core.data.transforms import (
    clip_boxes,
    corner_boxes,
    flip_boxes,
    network_sizes,
    resize,
    scale_boxes,
    usable_boxes,
)
from core.errors import UserError
from core.geometry import Geometry
from core.types import Batch

Item = TypeVar("Item")
Scale = tuple[int, int]  # short side and the limit of the long side, pixels


class Sample(NamedTuple):
    """One image on its way into a batch."""

    image: UInt8[np.ndarray, "h w 3"]
    boxes: Float64[np.ndarray, "g 4"]  # xyxy pixels of the image
    labels: Int32[np.ndarray, " g"]


# A method's own augmentation in place of resizing and mirroring: a pure function of the image of a file with the boxes
# that can be targets, the size (height, width) that its result must have, and random numbers. It may drop boxes, never
# add one.
Augment = Callable[[Sample, tuple[int, int], np.random.Generator], Sample]


def train_batches(
    table: Table,
    config: TrainConfig,
    *,
    start: int,
    steps: int,
    rank: int = 0,
    world_size: int = 1,
    augment: Augment | None = None,
) -> Iterator[Batch]:
    """This rank's share of the batches of steps start + 1 .. steps.

    The global batch is a pure function of (config.seed, step); ranks cut it into equal consecutive parts. All ranks
    share one canvas and one G, the padded number of objects.

    Args:
        table: training images.
        config: data, resizing, batch size, seed, workers.
        start: steps that are already done.
        steps: of the whole run.
        rank: this process.
        world_size: number of processes.
        augment: what happens to an image instead of resizing and mirroring; its random numbers are a pure function of
            (config.seed, step, place in the global batch).

    Raises:
        UserError: batch_size does not divide among the ranks, nothing to train on, or an image that cannot be read.
    """
    if config.batch_size % world_size:
        raise UserError(f"batch_size {config.batch_size} does not divide among {world_size} processes")
    sampler = training_sampler(table, config)
    share = config.batch_size // world_size
    mine = slice(rank * share, (rank + 1) * share)
    return _load(partial(_train_batch, table, config, sampler, mine, augment), range(start + 1, steps + 1), config)


def eval_batches(
    table: Table, config: TrainConfig, *, rank: int = 0, world_size: int = 1, batch_size: int | None = None
) -> Iterator[Batch]:
    """This rank's share of a split: every image once over all ranks, nothing added.

    Only images of equal canvas, their own resized size rounded up to 32, share a batch, so that no result depends on
    which images happen to be together.

    Args:
        table: all its images are used, also those without boxes.
        config: how images are resized, workers.
        rank: this process.
        world_size: number of processes.
        batch_size: images of a batch; default the rank's share of config.batch_size, or 1 with config.deterministic.
    """
    rows, count = np.arange(len(table)), batch_size or _eval_batch_size(config, world_size)
    plans = eval_plans(table, config, rows, config.scale, count)[rank::world_size]
    return _load(partial(_eval_batch, table, config, plans), range(len(plans)), config)


def scaled_batches(
    table: Table, config: TrainConfig, scales: Sequence[Scale], *, rank: int = 0, world_size: int = 1
) -> Iterator[list[Batch]]:
    """This rank's share of a split at several scales: a list of batches for each scale in turn, again and again.

    The first of each `len(scales)` lists is one batch, as `eval_batches` makes it; the others hold the same images at
    the other scales, each cut by its own canvases and by the pixels that a batch of the first scale has.

    Args:
        table: all its images are used.
        config: batch size, workers, rounding.
        scales: (short side, limit of the long side); `eval_batches` has the configuration's.
        rank: this process.
        world_size: number of processes.
    """
    count = _eval_batch_size(config, world_size)
    plans = eval_plans(table, config, np.arange(len(table)), scales[0], count)[rank::world_size]
    return _load(partial(_scaled_batches, table, config, plans, scales, count), range(len(plans) * len(scales)), config)


def _eval_batch_size(config: TrainConfig, world_size: int) -> int:
    return 1 if config.deterministic else max(1, config.batch_size // world_size)


def eval_plans(
    table: Table, config: TrainConfig, images: Int64[np.ndarray, " n"], scale: Scale, batch_size: int
) -> list[BatchPlan]:
    """Batches of some images by falling canvas area: the largest comes first, so memory runs out at once or never.

    Args:
        table: whose rows they are.
        config: how images are resized.
        images: rows of the table.
        scale: short side and limit of the long side.
        batch_size: largest number of images of a batch.
    """
    sizes = np.stack([table.heights[images], table.widths[images]], axis=1)
    resized = network_sizes(sizes, scale, config.resize_rule)
    canvases, group = np.unique(round_up_all(resized), axis=0, return_inverse=True)
    plans = []
    for index in np.argsort(-canvases.prod(axis=1), kind="stable"):
        rows = images[group.reshape(-1) == index]
        canvas = (int(canvases[index, 0]), int(canvases[index, 1]))
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            plans.append(BatchPlan(part, np.zeros(len(part), bool), *scale, canvas))
    return plans


def round_up_all(sizes: Int64[np.ndarray, "n 2"]) -> Int64[np.ndarray, "n 2"]:
    """Every side rounded up to a multiple of 32."""
    return -(-sizes // SIZE_DIVISOR) * SIZE_DIVISOR


def padded_count(count: int) -> int:
    """Length G of the object axis: 4, 6, 8, 12, 16, 24, 32 ..., a short list, so that shapes are few."""
    size = 4
    while size < count:
        size = size * 3 // 2 if size.bit_count() == 1 else size * 4 // 3
    return size


def make_batch(
    table: Table, config: TrainConfig, plan: BatchPlan, part: slice, augment: Augment | None = None, step: int = 0
) -> Batch:
    """Reads, resizes, flips and pads the images `part` of a global batch; those of step `step` for `augment`."""
    rows, flips = plan.images[part], plan.flips[part]
    sizes = np.stack([table.heights[rows], table.widths[rows]], axis=1).astype(np.int64)
    resized = network_sizes(sizes, (plan.short_side, plan.long_side), config.resize_rule)
    samples = []
    for place, row, (height, width), flip in zip(
        range(len(plan.images))[part], rows.tolist(), resized.tolist(), flips.tolist(), strict=True
    ):
        sample = read_sample(table, row, config.box_geometry)
        if augment is None:
            samples.append(resize_sample(sample, (height, width), flip, config.box_geometry))
        else:
            samples.append(augment(sample, (height, width), augmentation_random(config.seed, step, place)))
    counts = table.box_offsets[plan.images + 1] - table.box_offsets[plan.images]
    objects = padded_count(int(counts.max(initial=0)))
    images = torch.zeros(len(rows), 3, *plan.canvas, dtype=torch.uint8)
    boxes = torch.zeros(len(rows), objects, 4)
    labels = torch.zeros(len(rows), objects, dtype=torch.int64)
    valid = torch.zeros(len(rows), objects, dtype=torch.bool)
    for i, sample in enumerate(samples):
        height, width, _ = sample.image.shape
        count = len(sample.labels)
        images.numpy()[i, :, :height, :width] = sample.image.transpose(2, 0, 1)
        boxes.numpy()[i, :count] = sample.boxes
        labels.numpy()[i, :count] = sample.labels
        valid[i, :count] = True
    ids = torch.from_numpy(table.image_ids[rows])
    return Batch(images, torch.from_numpy(resized), boxes, labels, valid, ids, torch.from_numpy(sizes))


def read_sample(table: Table, row: int, geometry: Geometry) -> Sample:
    """One image of a file with the boxes that can be targets."""
    image = table.read_image(row)
    boxes_of = table.box_slice(row)
    boxes = clip_boxes(corner_boxes(table.boxes_xywh[boxes_of], geometry), _size(image), geometry)
    keep = usable_boxes(boxes, table.crowd[boxes_of])
    return Sample(image, boxes[keep], table.labels[boxes_of][keep])


def resize_sample(sample: Sample, size: tuple[int, int], flip: bool, geometry: Geometry) -> Sample:
    """The image resized to `size` = (height, width), mirrored if `flip`, and its boxes with it."""
    image, boxes = resize(sample.image, size), scale_boxes(sample.boxes, _size(sample.image), size)
    if flip:
        image, boxes = image[:, ::-1], flip_boxes(boxes, size[1], geometry)
    return Sample(image, boxes, sample.labels)


def _size(image: UInt8[np.ndarray, "h w 3"]) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _train_batch(
    table: Table, config: TrainConfig, sampler: Sampler, part: slice, augment: Augment | None, step: int
) -> Batch:
    return make_batch(table, config, sampler.batch(step), part, augment, step)


def _eval_batch(table: Table, config: TrainConfig, plans: list[BatchPlan], index: int) -> Batch:
    return make_batch(table, config, plans[index], slice(None))


def _scaled_batches(
    table: Table, config: TrainConfig, plans: list[BatchPlan], scales: Sequence[Scale], batch_size: int, index: int
) -> list[Batch]:
    images, scale = plans[index // len(scales)].images, scales[index % len(scales)]
    count = max(1, int(batch_size * (scales[0][0] / scale[0]) ** 2))
    return [make_batch(table, config, plan, slice(None)) for plan in eval_plans(table, config, images, scale, count)]


class _Batches(Dataset[Any]):
    """Number to batch. A user's mistake is returned, since a raised one would come back wrapped in a trace."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, index: int) -> Any:
        try:
            return self.make(index)
        except UserError as error:
            return error


def _load(make: Callable[[int], Item], indices: Sequence[int], config: TrainConfig) -> Iterator[Item]:
    pin = torch.cuda.is_available() and config.device != "cpu"
    loader = DataLoader(
        _Batches(make),
        batch_size=None,
        sampler=indices,
        num_workers=min(config.workers, len(indices)),
        collate_fn=_unchanged,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # for worker seeds; the global one would differ in a resumed run
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(worker: int) -> None:
    """One thread; Ctrl-C and SIGTERM, which often go to a whole group of processes, are the main process's.

    A SIGTERM from the main process ends the worker at once: it is leaving, and waits for its workers. Where the sender
    cannot be known, a second SIGTERM does.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, _end_at_the_next)


def _end_with_the_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def _end_at_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)

"""From a model and a split to metrics: what evaluation during training and the `evaluate` command share."""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from core import checkpoint, distributed
from core.config import TrainConfig
from core.data.images import ImageFolder
from core.data.loader import eval_batches, scaled_batches
from core.data.sources import DataSource
from core.data.table import Category, Table
from core.errors import UserError
from core.evaluator import (
    DetectionArrays,
    GroundTruth,
    coco_metrics,
    concatenate,
    detection_arrays,
    ground_truth_from_table,
    read_ground_truth,
)
from core.nms import to_detections
from core.stopping import StopAsked, until_asked
from core.tta import View, flip_images, merge, view_candidates
from core.types import Batch, Detections
from core.voc import evaluate_voc

# A method's `detect` with its configuration bound: (outputs, sizes, original_sizes=...) to detections.
Detect = Callable[..., Detections]


def describe_run(method: str, data: DataSource, config: TrainConfig) -> dict[str, Any]:
    """What travels in every checkpoint beside weights and configuration: plain values only."""
    return {
        "method": method,
        "categories": [[category.id, category.name] for category in data.categories],
        **config.conventions,
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "licence": data.licence,
    }


def load_start_weights(model: nn.Module, config: TrainConfig, method: str) -> None:
    """Start from the model that `config.weights` names, if it names one.

    Raises:
        UserError: for a checkpoint that is damaged, another method's, or of another layout or number of classes.
    """
    if config.weights:
        checkpoint.load_weights(model, checkpoint.load(config.weights, method=method), config.weights)


def on_validation(
    detect: Detect, table: Table, config: TrainConfig, device: torch.device
) -> Callable[..., dict[str, float]]:
    """What `fit` calls to evaluate: a model to the 12 COCO numbers on this split, shared out over the ranks.

    Data of a VOC folder also give VOC07 and VOC12; what `fit` looks at stays AP. With a second argument, `StopAsked`,
    it raises `StopRequested` on every rank after the batch during which a rank was asked to stop.
    """

    def evaluate(model: nn.Module, stop_asked: StopAsked | None = None) -> dict[str, float]:
        found = detect_table(model, detect, table, config, device, stop_asked=stop_asked)
        if not distributed.is_main():
            return {}
        truth = ground_truth(table)
        voc = evaluate_voc(truth, found).metrics if table.protocol == "voc" else {}
        return coco_metrics(truth, found) | voc

    return evaluate


def ground_truth(table: Table) -> GroundTruth:
    """What a split's detections are compared with: every box of its annotation file.

    Reading drops a few boxes that cannot be targets (`core.data.parse`). Where that happened the file is read again:
    official numbers count them. A VOC folder's are left out.
    """
    return (
        read_ground_truth(Path(table.source))
        if table.notes and table.protocol == "coco"
        else ground_truth_from_table(table)
    )


@torch.no_grad()
def detect_table(
    model: nn.Module,
    detect: Detect,
    table: Table,
    config: TrainConfig,
    device: torch.device,
    views: Sequence[View] = (),
    stop_asked: StopAsked | None = None,
) -> DetectionArrays:
    """Detections of a whole split in pixels of the image files; each rank does its share, every rank gets all.

    They come by image id, in an image by falling score, whatever the number of ranks and the size of batches. The model
    must be in evaluation mode and on `device`. With `views` an image is looked at in each of them and what is found is
    merged (`core.tta`); otherwise once, at the configuration's size. With `stop_asked` it raises StopRequested on every
    rank after the batch during which a rank was asked.
    """
    category_ids = np.array([category.id for category in table.categories], dtype=np.int64)

    def find(batch: Batch, flip: bool = False) -> Detections:
        there = batch.to(device)
        images = flip_images(there.images, there.sizes) if flip else there.images
        return detect_batch(model, detect, there._replace(images=images), config)

    found = _find_in_views(find, table, config, views) if views else _find_once(find, table, config)
    if stop_asked is not None:
        found = until_asked(found, stop_asked, device)
    hidden = not (views and distributed.is_main() and sys.stderr.isatty())
    parts = []
    with tqdm(total=len(table) // distributed.world_size(), unit="image", disable=hidden) as bar:
        for batch, detections in found:
            parts.append(detection_arrays(detections, batch, category_ids, config.box_geometry))
            bar.update(len(batch.sizes))
    whole = concatenate(distributed.gather_objects(concatenate(parts)))
    order = whole.image_id.argsort(kind="stable")
    return DetectionArrays(*(field[order] for field in whole))


def _find_once(
    find: Callable[..., Detections], table: Table, config: TrainConfig
) -> Iterator[tuple[Batch, Detections]]:
    for batch in eval_batches(table, config, rank=distributed.rank(), world_size=distributed.world_size()):
        yield batch, find(batch)


def _find_in_views(
    find: Callable[..., Detections], table: Table, config: TrainConfig, views: Sequence[View]
) -> Iterator[tuple[Batch, Detections]]:
    """Batches of the first view with what is found in all views, merged; one view has nothing to merge.

    The device sees one view of one batch at a time. Merging is the CPU's: its sums have one order.
    """
    scales = list(dict.fromkeys(view.scale for view in views))
    lists = scaled_batches(table, config, scales, rank=distributed.rank(), world_size=distributed.world_size())
    for first in lists:
        (plain,) = first
        found = []
        for scale, batches in zip(scales, chain([first], lists), strict=False):  # takes one list for each scale
            for batch, view in product(batches, [view for view in views if view.scale == scale]):
                images = (batch.image_ids[:, None] == plain.image_ids).nonzero()[:, 1]
                detections = Detections(*(field.cpu() for field in find(batch, view.flip)))
                sizes = batch.sizes, plain.sizes[images]
                found.append(view_candidates(detections, view, images, *sizes, config.box_geometry))
        count = len(plain.sizes)
        yield plain, merge(found, count, config.box_geometry) if len(views) > 1 else to_detections(found[0], count)


def detect_batch(model: nn.Module, detect: Detect, batch: Batch, config: TrainConfig) -> Detections:
    """Detections of one batch in pixels of the network input; the network in the configuration's precision."""
    device_type = batch.images.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bf16"):
        outputs = model(batch.images, batch.sizes)
    return detect(outputs, batch.sizes, original_sizes=batch.original_sizes)


def check_categories(table: Table, categories: tuple[Category, ...], weights: str) -> None:
    """Refuse data whose classes are not the model's.

    Raises:
        UserError: naming the first difference.
    """
    if len(table.categories) != len(categories):
        raise UserError(
            f"{weights}: the model knows {len(categories)} classes, {table.source} has {len(table.categories)}"
        )
    for mine, theirs in zip(categories, table.categories, strict=True):
        if mine != theirs:
            raise UserError(
                f"{weights}: the model's class {mine.id} {mine.name!r} is {theirs.id} {theirs.name!r} in {table.source}"
            )


def example_images(data: DataSource) -> str:
    """Something to predict on: the word shapes, or the first image of val."""
    reader = data.val.images
    return str(reader.folder / data.val.name(0)) if isinstance(reader, ImageFolder) else "shapes"
